#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/unique_fd.hpp"
#include "transport/descriptor_protocol.hpp"

namespace dwdp::transport {

struct Descriptor {
  UniqueFd fd;
  std::uint64_t num_bytes = 0;
};

// Hands published descriptors to processes of the same user that know the token. Listens under a
// random name of the abstract namespace, which leaves nothing behind however the process ends.
class DescriptorServer {
 public:
  // A client that is silent, or does not take its answer, is dropped after `client_timeout`.
  DescriptorServer(const Token& token, std::chrono::milliseconds client_timeout);
  DescriptorServer(const DescriptorServer&) = delete;
  DescriptorServer& operator=(const DescriptorServer&) = delete;
  ~DescriptorServer() noexcept { close(); }

  // What clients connect to: "@dwdp-<pid>-<32 hexadecimal digits>".
  const std::string& address() const noexcept { return address_; }

  // Throws FabricError when `name` is taken, empty or longer than kMaxNameBytes, or after close().
  void publish(const std::string& name, std::vector<Descriptor> descriptors);

  // Drops clients and descriptors and ends the thread. Idempotent.
  void close() noexcept;

 private:
  using Clock = std::chrono::steady_clock;
  using Published = std::shared_ptr<const std::vector<Descriptor>>;
  struct Client;

  void run();
  void accept_clients(std::vector<Client>& clients);
  // These return whether the client is to be kept.
  bool serve(Client& client);
  bool receive_request(Client& client);
  bool send_answer(Client& client);
  Published find(const std::string& name);

  const Token token_;
  const std::chrono::milliseconds client_timeout_;
  const int pid_;
  std::string address_;
  UniqueFd listener_;
  UniqueFd wake_;  // an eventfd that ends the thread
  Clock::time_point accept_again_{};

  std::mutex publish_mutex_;
  bool closed_ = false;
  std::map<std::string, Published> published_;

  std::mutex join_mutex_;
  std::thread thread_;
};

}  // namespace dwdp::transport
