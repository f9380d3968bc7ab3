// What a descriptor server and its clients say to each other over a SOCK_SEQPACKET socket.
//
// A client sends one RequestHeader, followed by the name it asks for. The server answers with
// packets that start with an AnswerHeader. A refusal is one packet, and its text follows. Otherwise
// `num_descriptors` sizes (uint64 each) follow, their descriptors ride along (SCM_RIGHTS), and the
// packets end when `num_descriptors_total` have been sent. Both ends are on one machine and run the
// same build, so numbers are in native byte order.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace dwdp::transport {

using Token = std::array<unsigned char, 16>;

inline constexpr std::uint32_t kMagic = 0x70647764;  // "dwdp"
inline constexpr std::size_t kMaxNameBytes = 1024;
inline constexpr std::size_t kMaxTextBytes = 1024;

// The kernel passes at most SCM_MAX_FD = 253 in one message.
inline constexpr std::size_t kMaxDescriptorsPerPacket = 250;

struct RequestHeader {
  std::uint32_t magic;
  std::uint32_t name_bytes;
  Token token;
};

enum class Status : std::uint32_t { kOk = 0, kRefused = 1 };

struct AnswerHeader {
  std::uint32_t magic;
  Status status;
  std::uint32_t num_descriptors_total;
  std::uint32_t num_descriptors;
};

inline constexpr std::size_t kMaxRequestBytes = sizeof(RequestHeader) + kMaxNameBytes;
inline constexpr std::size_t kMaxAnswerBytes =
    sizeof(AnswerHeader) + kMaxDescriptorsPerPacket * sizeof(std::uint64_t);
static_assert(sizeof(AnswerHeader) + kMaxTextBytes <= kMaxAnswerBytes);

// Throws FabricError unless `bytes` holds exactly one token.
Token parse_token(const std::string& bytes);

// Takes the same time wherever the tokens differ.
bool equal(const Token& a, const Token& b) noexcept;

// A printable address of the abstract namespace, "@name", as the kernel wants it. Such a name has
// no file and goes away with its socket. Throws FabricError for anything else.
struct SocketAddress {
  explicit SocketAddress(const std::string& printable);

  sockaddr_un address{};
  socklen_t length = 0;
};

// Empty when the process at the other end of `fd` belongs to our user or to root, else what is
// wrong.
std::string check_peer(int fd);

}  // namespace dwdp::transport
