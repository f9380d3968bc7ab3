#include "transport/descriptor_client.hpp"

#include <poll.h>
#include <sys/time.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

#include "common/error.hpp"
#include "common/unique_fd.hpp"

namespace dwdp::transport {
namespace {

struct Packet {
  AnswerHeader header{};
  std::vector<std::uint64_t> sizes;
  std::string refusal;
  std::vector<UniqueFd> fds;
};

std::string describe_request(const std::string& address, const std::string& name) {
  return concat("fetching the regions of '", name, "' from ", address);
}

// One request to one server, until a deadline.
class Connection {
 public:
  Connection(const std::string& address, std::string request, std::chrono::milliseconds timeout,
             const std::function<void()>& on_interrupt)
      : request_(std::move(request)),
        timeout_(timeout),
        deadline_(Clock::now() + timeout),
        on_interrupt_(on_interrupt) {
    connect_to(address);
    const std::string stranger = check_peer(socket_.get());
    DWDP_CHECK(stranger.empty(), request_, ": the server cannot be trusted: ", stranger);
  }

  void send_request(const Token& token, const std::string& name);
  Packet receive();

 private:
  using Clock = std::chrono::steady_clock;

  void connect_to(const std::string& address);
  void wait_for(short events);
  std::chrono::milliseconds time_left() const;

  const std::string request_;  // begins every error
  const std::chrono::milliseconds timeout_;
  const Clock::time_point deadline_;
  const std::function<void()>& on_interrupt_;
  UniqueFd socket_;
};

std::chrono::milliseconds Connection::time_left() const {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline_ - Clock::now());
  DWDP_CHECK(left.count() > 0, request_, ": no answer within ", timeout_.count() / 1000.0, " s");
  return left;
}

void Connection::connect_to(const std::string& address) {
  const SocketAddress target(address);
  socket_.reset(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  DWDP_CHECK_ERRNO(socket_.valid(), "socket", request_);
  while (true) {
    // Bounds the wait for a place in the server's backlog.
    const auto left = time_left().count();
    timeval limit{};
    limit.tv_sec = static_cast<time_t>(left / 1000);
    limit.tv_usec = static_cast<suseconds_t>(left % 1000 * 1000);
    DWDP_CHECK_ERRNO(setsockopt(socket_.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) == 0,
                     "setsockopt(SO_SNDTIMEO)", request_);
    if (connect(socket_.get(), reinterpret_cast<const sockaddr*>(&target.address), target.length) ==
        0) {
      return;
    }
    if (errno == EINTR) {
      on_interrupt_();
    } else if (errno != EAGAIN) {
      DWDP_CHECK_ERRNO(errno != ECONNREFUSED, "connect", request_,
                       "; the process has ended, or runs in another network namespace");
      DWDP_CHECK_ERRNO(false, "connect", request_);
    }
  }
}

void Connection::wait_for(short events) {
  while (true) {
    pollfd polled{socket_.get(), events, 0};
    const auto left = std::min<std::int64_t>(time_left().count(), 1 << 30);
    const int ready = poll(&polled, 1, static_cast<int>(left));
    if (ready > 0) return;
    if (ready < 0) {
      DWDP_CHECK_ERRNO(errno == EINTR, "poll", request_);
      on_interrupt_();
    }
  }
}

void Connection::send_request(const Token& token, const std::string& name) {
  DWDP_CHECK(!name.empty() && name.size() <= kMaxNameBytes, "a published name has 1 to ",
             kMaxNameBytes, " bytes, not ", name.size());
  const RequestHeader header{kMagic, static_cast<std::uint32_t>(name.size()), token};
  std::string packet(reinterpret_cast<const char*>(&header), sizeof(header));
  packet += name;
  wait_for(POLLOUT);
  const ssize_t sent = send(socket_.get(), packet.data(), packet.size(), MSG_NOSIGNAL);
  DWDP_CHECK_ERRNO(sent == static_cast<ssize_t>(packet.size()), "send", request_);
}

Packet Connection::receive() {
  char buffer[kMaxAnswerBytes];
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptorsPerPacket * sizeof(int))];
  iovec part{buffer, sizeof(buffer)};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  wait_for(POLLIN);
  const ssize_t received = recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC);
  DWDP_CHECK_ERRNO(received >= 0, "recvmsg", request_);

  Packet packet;
  // First of all own what has arrived, so that no error below leaks a descriptor.
  for (cmsghdr* part_header = CMSG_FIRSTHDR(&message); part_header != nullptr;
       part_header = CMSG_NXTHDR(&message, part_header)) {
    if (part_header->cmsg_level != SOL_SOCKET || part_header->cmsg_type != SCM_RIGHTS) continue;
    int fds[kMaxDescriptorsPerPacket];
    const std::size_t count = (part_header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    std::memcpy(fds, CMSG_DATA(part_header), count * sizeof(int));
    for (std::size_t i = 0; i < count; ++i) packet.fds.emplace_back(fds[i]);
  }
  DWDP_CHECK(received > 0, request_, ": the server closed the connection without an answer");
  DWDP_CHECK((message.msg_flags & MSG_CTRUNC) == 0, request_, ": only ", packet.fds.size(),
             " descriptors of one packet could be received; raise this process's limit of open "
             "files (ulimit -n)");
  const auto length = static_cast<std::size_t>(received);
  AnswerHeader& header = packet.header;
  if (length >= sizeof(header)) std::memcpy(&header, buffer, sizeof(header));
  DWDP_CHECK(header.magic == kMagic, request_, ": a packet of ", length,
             " bytes is not from a descriptor server");
  const char* const body = buffer + sizeof(header);
  const std::size_t body_bytes = length - sizeof(header);
  if (header.status == Status::kRefused) {
    packet.refusal.assign(body, body_bytes);
    return packet;
  }
  const std::size_t count = header.num_descriptors;
  DWDP_CHECK(body_bytes == count * sizeof(std::uint64_t) && packet.fds.size() == count, request_,
             ": a packet announces ", count, " regions and carries ", packet.fds.size(),
             " descriptors and ", body_bytes, " bytes of sizes");
  packet.sizes.resize(count);
  if (count > 0) std::memcpy(packet.sizes.data(), body, body_bytes);
  return packet;
}

}  // namespace

std::string origin(const std::string& address, const std::string& name, std::size_t index) {
  return concat(describe_request(address, name), ": region ", index);
}

std::vector<UniqueFd> fetch_descriptors(const std::string& address, const Token& token,
                                        const std::string& name,
                                        const std::vector<std::size_t>& sizes,
                                        std::chrono::milliseconds timeout,
                                        const std::function<void()>& on_interrupt) {
  const std::string request = describe_request(address, name);
  Connection connection(address, request, timeout, on_interrupt);
  connection.send_request(token, name);
  std::vector<UniqueFd> fds;
  fds.reserve(sizes.size());
  do {
    Packet packet = connection.receive();
    DWDP_CHECK(packet.header.status == Status::kOk, request, ": refused: ", packet.refusal);
    DWDP_CHECK(packet.header.num_descriptors_total == sizes.size(), request, ": it has ",
               packet.header.num_descriptors_total, " regions, not the ", sizes.size(),
               " expected");
    DWDP_CHECK(
        packet.fds.size() <= sizes.size() - fds.size() && (!packet.fds.empty() || sizes.empty()),
        request, ": a packet of ", packet.fds.size(), " regions came after ", fds.size(), " of ",
        sizes.size());
    for (std::size_t i = 0; i < packet.fds.size(); ++i) {
      const std::size_t index = fds.size();
      DWDP_CHECK(packet.sizes[i] == sizes[index], origin(address, name, index), " has ",
                 packet.sizes[i], " bytes, not the ", sizes[index], " expected");
      fds.push_back(std::move(packet.fds[i]));
    }
  } while (fds.size() < sizes.size());
  return fds;
}

}  // namespace dwdp::transport
