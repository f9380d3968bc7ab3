#include "transport/descriptor_server.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <utility>

#include "common/error.hpp"
#include "common/thread.hpp"

namespace dwdp::transport {
namespace {

// More wait in the listener's backlog, so that strangers cannot use up our descriptors.
constexpr std::size_t kMaxClients = 256;

// Holds two full packets, so that a client that does not read keeps few descriptors on their way:
// the kernel limits how many a user may have there.
constexpr int kSendBufferBytes = 4096;

// Before the next try when the system is short of descriptors.
constexpr std::chrono::milliseconds kPause{20};

std::string random_address() {
  unsigned char bytes[16];
  DWDP_CHECK_ERRNO(getrandom(bytes, sizeof(bytes), 0) == static_cast<ssize_t>(sizeof(bytes)),
                   "getrandom", "naming a descriptor server");
  std::string name = concat("@dwdp-", getpid(), "-");
  for (const unsigned char byte : bytes) {
    constexpr char kDigits[] = "0123456789abcdef";
    name += kDigits[byte >> 4];
    name += kDigits[byte & 15];
  }
  return name;
}

}  // namespace

struct DescriptorServer::Client {
  UniqueFd socket;
  Clock::time_point deadline;
  std::string stranger;  // not empty: whose request is refused, and why
  bool answering = false;
  std::string refusal;
  Published answer;
  std::size_t num_sent = 0;
  std::optional<Clock::time_point> send_again;  // too many descriptors are on their way
};

DescriptorServer::DescriptorServer(const Token& token, std::chrono::milliseconds client_timeout)
    : token_(token), client_timeout_(client_timeout), pid_(getpid()), address_(random_address()) {
  const SocketAddress address(address_);
  listener_.reset(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  DWDP_CHECK_ERRNO(listener_.valid(), "socket", "making a descriptor server");
  DWDP_CHECK_ERRNO(bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address.address),
                        address.length) == 0,
                   "bind", "naming a descriptor server ", address_);
  DWDP_CHECK_ERRNO(listen(listener_.get(), SOMAXCONN) == 0, "listen", "on ", address_);
  wake_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  DWDP_CHECK_ERRNO(wake_.valid(), "eventfd", "making a descriptor server");
  thread_ = start_thread("dwdp-fd-server", [this] { run(); });
}

void DescriptorServer::publish(const std::string& name, std::vector<Descriptor> descriptors) {
  DWDP_CHECK(!name.empty() && name.size() <= kMaxNameBytes, "a published name has 1 to ",
             kMaxNameBytes, " bytes, not ", name.size());
  auto published = std::make_shared<const std::vector<Descriptor>>(std::move(descriptors));
  const std::lock_guard<std::mutex> lock(publish_mutex_);
  DWDP_CHECK(!closed_, "'", name, "' cannot be published: the descriptor server is closed");
  DWDP_CHECK(published_.emplace(name, std::move(published)).second, "'", name,
             "' has already been published");
}

DescriptorServer::Published DescriptorServer::find(const std::string& name) {
  const std::lock_guard<std::mutex> lock(publish_mutex_);
  const auto found = published_.find(name);
  return found == published_.end() ? nullptr : found->second;
}

void DescriptorServer::close() noexcept {
  if (getpid() != pid_) {
    // In a forked child the thread does not exist, and a lock may be held for ever.
    if (thread_.joinable()) thread_.detach();
    listener_.reset();
    wake_.reset();
    return;
  }
  const std::lock_guard<std::mutex> join_lock(join_mutex_);
  if (!thread_.joinable()) return;
  const std::uint64_t one = 1;
  // Cannot fail: the counter is far from its limit.
  [[maybe_unused]] const ssize_t written = write(wake_.get(), &one, sizeof(one));
  thread_.join();
  listener_.reset();
  wake_.reset();
  const std::lock_guard<std::mutex> lock(publish_mutex_);
  closed_ = true;
  published_.clear();
}

void DescriptorServer::run() {
  std::vector<Client> clients;
  std::vector<pollfd> polled;
  while (true) {
    const auto before = Clock::now();
    auto wake_at = Clock::time_point::max();
    polled.assign({{wake_.get(), POLLIN, 0}, {listener_.get(), POLLIN, 0}});
    // poll ignores a negative descriptor.
    if (clients.size() >= kMaxClients) polled[1].fd = -1;
    if (before < accept_again_) {
      polled[1].fd = -1;
      wake_at = accept_again_;
    }
    for (const Client& client : clients) {
      const bool paused = client.send_again && before < *client.send_again;
      const short events = client.answering ? POLLOUT : POLLIN;
      polled.push_back({client.socket.get(), paused ? short{0} : events, 0});
      wake_at = std::min(wake_at,
                         paused ? std::min(client.deadline, *client.send_again) : client.deadline);
    }
    int timeout_ms = -1;
    if (wake_at != Clock::time_point::max()) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(wake_at - before).count();
      timeout_ms = static_cast<int>(std::clamp<decltype(left)>(left, 0, 1 << 30));
    }
    // Fails only when memory is short; the next round tries again.
    if (poll(polled.data(), polled.size(), timeout_ms) < 0) continue;
    if (polled[0].revents != 0) return;

    const auto now = Clock::now();
    std::size_t kept = 0;
    for (std::size_t i = 0; i < clients.size(); ++i) {
      Client& client = clients[i];
      const bool ready = polled[2 + i].revents != 0;
      // Serving moves the deadline on when there is progress.
      if (ready && !serve(client)) continue;
      if (now >= client.deadline) continue;
      if (kept != i) clients[kept] = std::move(client);
      ++kept;
    }
    clients.resize(kept);
    if (polled[1].revents != 0) accept_clients(clients);
  }
}

void DescriptorServer::accept_clients(std::vector<Client>& clients) {
  while (clients.size() < kMaxClients) {
    UniqueFd socket(accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket.valid()) {
      const bool none_waiting = errno == EAGAIN || errno == EINTR || errno == ECONNABORTED;
      // Short of descriptors or memory: the client stays in the backlog meanwhile.
      if (!none_waiting) accept_again_ = Clock::now() + kPause;
      return;
    }
    Client client;
    client.deadline = Clock::now() + client_timeout_;
    try {
      client.stranger = check_peer(socket.get());
    } catch (const FabricError&) {
      continue;
    }
    setsockopt(socket.get(), SOL_SOCKET, SO_SNDBUF, &kSendBufferBytes, sizeof(kSendBufferBytes));
    client.socket = std::move(socket);
    clients.push_back(std::move(client));
  }
}

bool DescriptorServer::serve(Client& client) {
  if (!client.answering) return receive_request(client);
  return send_answer(client);
}

bool DescriptorServer::receive_request(Client& client) {
  char buffer[kMaxRequestBytes];
  // Without room for control data, descriptors that a client sends are dropped by the kernel.
  const ssize_t received = recv(client.socket.get(), buffer, sizeof(buffer), MSG_TRUNC);
  if (received < 0) return errno == EAGAIN || errno == EINTR;
  if (received == 0) return false;
  const auto length = static_cast<std::size_t>(received);
  RequestHeader header{};
  if (length >= sizeof(header)) std::memcpy(&header, buffer, sizeof(header));
  if (!client.stranger.empty()) {
    client.refusal = client.stranger;
  } else if (length > sizeof(buffer) || header.magic != kMagic ||
             header.name_bytes != length - sizeof(header)) {
    client.refusal = "this is not a request for regions";
  } else if (!equal(header.token, token_)) {
    client.refusal = "the token is wrong: this process does not belong to the group";
  } else {
    const std::string name(buffer + sizeof(header), header.name_bytes);
    client.answer = find(name);
    if (client.answer == nullptr) client.refusal = concat("'", name, "' is not published");
  }
  client.answering = true;
  client.deadline = Clock::now() + client_timeout_;
  return send_answer(client);
}

bool DescriptorServer::send_answer(Client& client) {
  client.send_again.reset();
  while (true) {
    AnswerHeader header{kMagic, Status::kOk, 0, 0};
    std::uint64_t sizes[kMaxDescriptorsPerPacket];
    alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptorsPerPacket * sizeof(int))] = {};
    iovec parts[2] = {{&header, sizeof(header)}, {nullptr, 0}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    std::size_t total = 0;
    std::size_t count = 0;
    if (client.answer == nullptr) {
      header.status = Status::kRefused;
      parts[1] = {client.refusal.data(), std::min(client.refusal.size(), kMaxTextBytes)};
    } else {
      const std::vector<Descriptor>& descriptors = *client.answer;
      total = descriptors.size();
      count = std::min(total - client.num_sent, kMaxDescriptorsPerPacket);
      header.num_descriptors_total = static_cast<std::uint32_t>(total);
      header.num_descriptors = static_cast<std::uint32_t>(count);
      int fds[kMaxDescriptorsPerPacket];
      for (std::size_t i = 0; i < count; ++i) {
        fds[i] = descriptors[client.num_sent + i].fd.get();
        sizes[i] = descriptors[client.num_sent + i].num_bytes;
      }
      parts[1] = {sizes, count * sizeof(sizes[0])};
      if (count > 0) {
        message.msg_control = control;
        message.msg_controllen = CMSG_SPACE(count * sizeof(int));
        cmsghdr* const rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(count * sizeof(int));
        std::memcpy(CMSG_DATA(rights), fds, count * sizeof(int));
      }
    }
    if (sendmsg(client.socket.get(), &message, MSG_NOSIGNAL) < 0) {
      if (errno == EINTR) continue;
      if (errno == EAGAIN) return true;
      // The user has too many descriptors in sockets: they become fewer as clients take them.
      if (errno != ETOOMANYREFS) return false;
      client.send_again = Clock::now() + kPause;
      return true;
    }
    client.num_sent += count;
    if (client.num_sent == total) return false;
    client.deadline = Clock::now() + client_timeout_;
  }
}

}  // namespace dwdp::transport
