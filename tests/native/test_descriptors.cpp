#include <dirent.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "common/error.hpp"
#include "host/address_range.hpp"
#include "host/region.hpp"
#include "transport/descriptor_client.hpp"
#include "transport/descriptor_server.hpp"

namespace dwdp::transport {
namespace {

using host::AddressRange;
using host::granularity;
using host::Region;
using std::chrono::milliseconds;

const Token kToken = parse_token("0123456789abcdef");
const std::function<void()> kIgnoreInterrupts = [] {};

std::vector<Region> fetch(const std::string& address, const std::string& name,
                          const std::vector<std::size_t>& sizes, const Token& token = kToken,
                          milliseconds timeout = milliseconds(20000)) {
  std::vector<UniqueFd> fds =
      fetch_descriptors(address, token, name, sizes, timeout, kIgnoreInterrupts);
  std::vector<Region> regions;
  for (std::size_t i = 0; i < fds.size(); ++i) {
    regions.push_back(Region::import(std::move(fds[i]), sizes[i], origin(address, name, i)));
  }
  return regions;
}

std::vector<Descriptor> descriptors_of(const std::vector<Region>& regions) {
  std::vector<Descriptor> descriptors;
  for (const Region& region : regions) {
    descriptors.push_back({region.export_descriptor(), region.num_bytes()});
  }
  return descriptors;
}

std::vector<Region> allocate(std::size_t count) {
  std::vector<Region> regions;
  for (std::size_t i = 0; i < count; ++i) {
    regions.push_back(Region::allocate(granularity()));
    AddressRange range(granularity());
    range.map(0, regions.back());
    range.enable_access(true);
    std::memcpy(reinterpret_cast<void*>(range.address()), &i, sizeof(i));
  }
  return regions;
}

std::size_t content(const Region& region) {
  AddressRange range(region.num_bytes());
  range.map(0, region);
  range.enable_access(false);
  return *reinterpret_cast<const std::size_t*>(range.address());
}

int count_descriptors() {
  int count = 0;
  DIR* const fds = opendir("/proc/self/fd");
  while (readdir(fds) != nullptr) ++count;
  closedir(fds);
  return count;
}

UniqueFd connect_raw(const std::string& address) {
  const SocketAddress target(address);
  UniqueFd fd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  CHECK_EQUAL(connect(fd.get(), reinterpret_cast<const sockaddr*>(&target.address), target.length),
              0);
  return fd;
}

TEST(server_hands_out_more_regions_than_fit_one_packet) {
  DescriptorServer server(kToken, milliseconds(5000));
  const std::vector<Region> regions = allocate(600);
  server.publish("many", descriptors_of(regions));
  server.publish("none", {});
  const std::vector<std::size_t> sizes(600, granularity());
  const std::vector<Region> fetched = fetch(server.address(), "many", sizes);
  CHECK_EQUAL(fetched.size(), regions.size());
  for (std::size_t i = 0; i < fetched.size(); ++i) {
    CHECK(fetched[i].imported());
    CHECK_EQUAL(content(fetched[i]), i);
  }
  CHECK(fetch(server.address(), "none", {}).empty());
}

TEST(server_refuses_with_a_reason) {
  DescriptorServer server(kToken, milliseconds(5000));
  const std::size_t g = granularity();
  server.publish("one", descriptors_of(allocate(1)));
  CHECK_ERROR(fetch(server.address(), "one", {g}, parse_token("0123456789abcdeF")),
              "refused: the token is wrong");
  CHECK_ERROR(fetch(server.address(), "two", {g}), "refused: 'two' is not published");
  CHECK_ERROR(fetch(server.address(), "one", {2 * g}), "region 0 has 4096 bytes, not the 8192");
  CHECK_ERROR(fetch(server.address(), "one", {g, g}), "it has 1 regions, not the 2 expected");
  CHECK_ERROR(fetch(server.address(), "one", {}), "it has 1 regions, not the 0 expected");
  CHECK_ERROR(server.publish("one", {}), "already been published");
  CHECK_ERROR(server.publish("", {}), "1 to 1024 bytes");
  CHECK_ERROR(server.publish(std::string(1025, 'n'), {}), "1 to 1024 bytes");
  CHECK_ERROR(parse_token("short"), "a token has 16 bytes, not 5");
  const std::string address = server.address();
  server.close();
  server.close();
  CHECK_ERROR(server.publish("late", {}), "is closed");
  CHECK_ERROR(fetch(address, "one", {g}), "Connection refused");
  CHECK_ERROR(fetch("/tmp/socket", "one", {g}), "is not the address of a descriptor server");
}

TEST(server_survives_garbage_and_silence_without_leaking) {
  DescriptorServer server(kToken, milliseconds(150));
  const std::size_t g = granularity();
  server.publish("one", descriptors_of(allocate(1)));
  const int before = count_descriptors();
  {
    std::vector<UniqueFd> clients;
    for (int i = 0; i < 300; ++i) clients.push_back(connect_raw(server.address()));
    for (int i = 0; i < 300; i += 30) {
      const std::string garbage(1 + 11 * i, 'x');
      send(clients[i].get(), garbage.data(), garbage.size(), MSG_NOSIGNAL);
    }
    // Beyond the 256 clients served at a time it waits until the silent ones are dropped.
    CHECK_EQUAL(fetch(server.address(), "one", {g}).size(), 1u);
  }
  CHECK(test::eventually([before] { return count_descriptors() == before; }));
}

TEST(client_honours_its_timeout) {
  const std::string address = "@dwdp-test-silent-" + std::to_string(getpid());
  const SocketAddress name(address);
  const UniqueFd listener(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
  CHECK_EQUAL(bind(listener.get(), reinterpret_cast<const sockaddr*>(&name.address), name.length),
              0);
  CHECK_EQUAL(listen(listener.get(), 0), 0);
  const auto start = std::chrono::steady_clock::now();
  CHECK_ERROR(fetch(address, "one", {granularity()}, kToken, milliseconds(200)),
              "no answer within 0.2 s");
  // That connection still fills the backlog of one, so this time connecting has to wait.
  CHECK_ERROR(fetch(address, "one", {granularity()}, kToken, milliseconds(200)),
              "no answer within 0.2 s");
  CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
}

TEST(server_drops_clients_that_do_not_take_their_answer) {
  DescriptorServer server(kToken, milliseconds(150));
  server.publish("many", descriptors_of(allocate(1000)));
  const int before = count_descriptors();
  const UniqueFd client = connect_raw(server.address());
  const RequestHeader header{kMagic, 4, kToken};
  std::string packet(reinterpret_cast<const char*>(&header), sizeof(header));
  packet += "many";
  CHECK_EQUAL(send(client.get(), packet.data(), packet.size(), 0),
              static_cast<ssize_t>(packet.size()));
  // Two descriptors: the client's end and the server's.
  CHECK(test::eventually([before] { return count_descriptors() == before + 2; }));
  CHECK(test::eventually([before] { return count_descriptors() == before + 1; }));
}

TEST(server_serves_many_clients_at_once) {
  DescriptorServer server(kToken, milliseconds(10000));
  const std::vector<std::size_t> sizes(260, granularity());
  server.publish("many", descriptors_of(allocate(sizes.size())));
  const int before = count_descriptors();
  std::atomic<int> num_wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int round = 0; round < 10; ++round) {
        const std::vector<Region> regions = fetch(server.address(), "many", sizes);
        if (content(regions.back()) != sizes.size() - 1) ++num_wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQUAL(num_wrong.load(), 0);
  CHECK(test::eventually([before] { return count_descriptors() == before; }));
}

}  // namespace
}  // namespace dwdp::transport
