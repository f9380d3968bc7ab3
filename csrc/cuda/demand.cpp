#include "cuda/demand.hpp"

#include <cstdint>
#include <cstring>
#include <utility>

namespace dwdp::cuda {
namespace {

// What any block can have without asking for more.
constexpr std::size_t kMaxExperts = 48 * 1024 * 8;

template <typename Element>
Element* at(CUdeviceptr address) {
  return reinterpret_cast<Element*>(static_cast<std::uintptr_t>(address));
}

}  // namespace

Demand::Demand(std::shared_ptr<Device> device, std::vector<std::vector<Copy>> experts,
               std::vector<std::shared_ptr<const void>> keep_mapped)
    : device_(std::move(device)),
      keep_mapped_(std::move(keep_mapped)),
      num_experts_(experts.size()) {
  DWDP_CHECK(num_experts_ <= kMaxExperts, "a layer of ", num_experts_,
             " experts cannot be fetched on demand: at most ", kMaxExperts, " can");
  const Slices checked(std::move(experts), "expert");
  num_bytes_ = checked.num_bytes();
  std::vector<DemandSlice> slices;
  std::vector<std::uint32_t> first_slice{0};
  slices.reserve(checked.num_slices());
  for (const std::vector<Copy>& expert : checked.lists()) {
    for (const Copy& copy : expert) {
      const auto dst = reinterpret_cast<std::uintptr_t>(copy.dst);
      const auto src = reinterpret_cast<std::uintptr_t>(copy.src);
      DWDP_CHECK(dst % kVectorBytes == src % kVectorBytes, "expert ", first_slice.size() - 1,
                 " of a fetch has a slice of ", copy.num_bytes, " bytes from ", copy.src, " to ",
                 copy.dst, ": their remainders modulo ", kVectorBytes, " differ");
      slices.push_back({static_cast<unsigned char*>(copy.dst),
                        static_cast<const unsigned char*>(copy.src), copy.num_bytes});
    }
    first_slice.push_back(static_cast<std::uint32_t>(slices.size()));
  }
  num_slices_ = slices.size();
  const std::size_t slices_bytes = slices.size() * sizeof(DemandSlice);
  const std::size_t firsts_bytes = first_slice.size() * sizeof(std::uint32_t);
  std::vector<unsigned char> table(slices_bytes + firsts_bytes);
  if (slices_bytes > 0) std::memcpy(table.data(), slices.data(), slices_bytes);
  std::memcpy(table.data() + slices_bytes, first_slice.data(), firsts_bytes);
  table_ = allocate_device_memory(device_->context(), table.size());
  device_->copy(table_.get(), reinterpret_cast<std::uintptr_t>(table.data()), table.size());
}

DemandArguments Demand::arguments() const noexcept {
  DemandArguments arguments{};
  arguments.slices = at<const DemandSlice>(table_.get());
  arguments.first_slice = at<const std::uint32_t>(table_.get() + num_slices_ * sizeof(DemandSlice));
  arguments.num_experts = static_cast<std::uint32_t>(num_experts_);
  return arguments;
}

unsigned int Demand::shared_bytes() const noexcept {
  return demand_words(static_cast<std::uint32_t>(num_experts_)) *
         static_cast<unsigned int>(sizeof(std::uint32_t));
}

}  // namespace dwdp::cuda
