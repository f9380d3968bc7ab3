#include "transport/descriptor_protocol.hpp"

#include <unistd.h>

#include <cstring>

#include "common/error.hpp"

namespace dwdp::transport {

Token parse_token(const std::string& bytes) {
  Token token;
  DWDP_CHECK(bytes.size() == token.size(), "a token has ", token.size(), " bytes, not ",
             bytes.size());
  std::memcpy(token.data(), bytes.data(), token.size());
  return token;
}

bool equal(const Token& a, const Token& b) noexcept {
  volatile unsigned char difference = 0;
  for (std::size_t i = 0; i < a.size(); ++i) difference = difference | (a[i] ^ b[i]);
  return difference == 0;
}

SocketAddress::SocketAddress(const std::string& printable) {
  DWDP_CHECK(printable.size() > 1 && printable.size() <= sizeof(address.sun_path) &&
                 printable.front() == '@',
             "'", printable, "' is not the address of a descriptor server, such as '@dwdp-...'");
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, printable.data(), printable.size());
  address.sun_path[0] = '\0';
  length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + printable.size());
}

std::string check_peer(int fd) {
  ucred peer{};
  socklen_t length = sizeof(peer);
  DWDP_CHECK_ERRNO(getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &length) == 0,
                   "getsockopt(SO_PEERCRED)", "asking who is at the other end of a socket");
  if (peer.uid == geteuid() || peer.uid == 0) return {};
  return concat("process ", peer.pid, " belongs to user ", peer.uid, ", not to user ", geteuid());
}

}  // namespace dwdp::transport
