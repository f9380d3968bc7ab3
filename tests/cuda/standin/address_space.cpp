// Reservations and mappings, and the bytes behind them.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "core.hpp"
#include "memory.hpp"

namespace standin {
namespace {

constexpr int kReserveFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
constexpr std::size_t kPageBytes = 4096;
// Pieces in which bytes move, so that an unmap from another thread gets in between.
constexpr std::size_t kChunkBytes = std::size_t{1} << 20;

void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

std::size_t round_up(std::size_t value, std::size_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int protection(int flags) {
  if (flags == CU_MEM_ACCESS_FLAGS_PROT_READWRITE) return PROT_READ | PROT_WRITE;
  return flags == CU_MEM_ACCESS_FLAGS_PROT_READ ? PROT_READ : PROT_NONE;
}

}  // namespace

AddressSpace& AddressSpace::instance() {
  static AddressSpace& space = *new AddressSpace;
  return space;
}

AddressSpace::AddressSpace() {
  void* const arena = mmap(nullptr, kArenaBytes, PROT_NONE, kReserveFlags, -1, 0);
  arena_ = arena == MAP_FAILED ? 0 : reinterpret_cast<CUdeviceptr>(arena);
  next_ = arena_;
}

CUresult AddressSpace::reserve(std::size_t num_bytes, std::size_t alignment, CUdeviceptr* address) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const std::size_t page = granularity();
  if (num_bytes == 0 || num_bytes % kPageBytes != 0) return CUDA_ERROR_INVALID_VALUE;
  if ((alignment & (alignment - 1)) != 0) return CUDA_ERROR_INVALID_VALUE;
  const CUdeviceptr start = round_up(next_, std::max(alignment, page));
  // The gap after it makes a step past the end of one reservation miss the next.
  const CUdeviceptr end = start + round_up(num_bytes, page) + page;
  if (arena_ == 0 || end > arena_ + kArenaBytes) return CUDA_ERROR_OUT_OF_MEMORY;
  next_ = end;
  reservations_[start] = Reservation{num_bytes, {}};
  *address = start;
  return CUDA_SUCCESS;
}

CUresult AddressSpace::free(CUdeviceptr address, std::size_t num_bytes) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  const auto found = reservations_.find(address);
  if (found == reservations_.end() || found->second.num_bytes != num_bytes ||
      !found->second.mappings.empty()) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  reservations_.erase(found);
  return CUDA_SUCCESS;
}

AddressSpace::Reservation* AddressSpace::containing(CUdeviceptr address, std::size_t num_bytes) {
  auto after = reservations_.upper_bound(address);
  if (after == reservations_.begin()) return nullptr;
  const auto found = std::prev(after);
  const std::size_t offset = address - found->first;
  const std::size_t available = found->second.num_bytes;
  if (offset > available || num_bytes > available - offset) return nullptr;
  return &found->second;
}

// Whether whole mappings make up exactly this range.
bool AddressSpace::tiled(const Reservation& reservation, CUdeviceptr address,
                         std::size_t num_bytes) {
  CUdeviceptr reached = address;
  auto mapping = reservation.mappings.find(address);
  while (mapping != reservation.mappings.end() && mapping->first == reached &&
         reached < address + num_bytes) {
    reached += mapping->second.num_bytes;
    ++mapping;
  }
  return num_bytes > 0 && reached == address + num_bytes;
}

CUresult AddressSpace::map(CUdeviceptr address, std::size_t num_bytes,
                           std::shared_ptr<Physical> physical) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  Reservation* const reservation = containing(address, num_bytes);
  if (reservation == nullptr || num_bytes == 0 || num_bytes != physical->num_bytes() ||
      address % granularity() != 0) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto& mappings = reservation->mappings;
  const auto next = mappings.lower_bound(address);
  if (next != mappings.end() && next->first < address + num_bytes) return CUDA_ERROR_INVALID_VALUE;
  if (next != mappings.begin()) {
    const auto& [start, before] = *std::prev(next);
    if (start + before.num_bytes > address) return CUDA_ERROR_INVALID_VALUE;
  }
  if (mmap(pointer(address), num_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, physical->fd(), 0) ==
      MAP_FAILED) {
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  mappings[address] = Mapping{num_bytes, std::move(physical), {}};
  return CUDA_SUCCESS;
}

CUresult AddressSpace::unmap(CUdeviceptr address, std::size_t num_bytes) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  Reservation* const reservation = containing(address, num_bytes);
  if (reservation == nullptr || !tiled(*reservation, address, num_bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  mmap(pointer(address), num_bytes, PROT_NONE, kReserveFlags | MAP_FIXED, -1, 0);
  auto& mappings = reservation->mappings;
  mappings.erase(mappings.find(address), mappings.lower_bound(address + num_bytes));
  return CUDA_SUCCESS;
}

CUresult AddressSpace::set_access(CUdeviceptr address, std::size_t num_bytes, CUdevice device,
                                  int flags) {
  const std::unique_lock<std::shared_mutex> lock(mutex_);
  Reservation* const reservation = containing(address, num_bytes);
  if (reservation == nullptr || !tiled(*reservation, address, num_bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  auto& mappings = reservation->mappings;
  for (auto mapping = mappings.find(address);
       mapping != mappings.end() && mapping->first < address + num_bytes; ++mapping) {
    mapping->second.access[device] = flags;
    int widest = 0;
    for (const auto& [_, granted] : mapping->second.access) widest |= granted;
    mprotect(pointer(mapping->first), mapping->second.num_bytes, protection(widest));
  }
  return CUDA_SUCCESS;
}

CUresult AddressSpace::get_access(CUdeviceptr address, CUdevice device, unsigned long long* flags) {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  Reservation* const reservation = containing(address, 1);
  if (reservation == nullptr) return CUDA_ERROR_INVALID_VALUE;
  auto after = reservation->mappings.upper_bound(address);
  if (after == reservation->mappings.begin()) return CUDA_ERROR_INVALID_VALUE;
  const auto& [start, mapping] = *std::prev(after);
  if (address - start >= mapping.num_bytes) return CUDA_ERROR_INVALID_VALUE;
  const auto granted = mapping.access.find(device);
  *flags = granted == mapping.access.end() ? 0 : static_cast<unsigned long long>(granted->second);
  return CUDA_SUCCESS;
}

std::shared_ptr<Physical> AddressSpace::physical_at(CUdeviceptr address) {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  Reservation* const reservation = containing(address, 1);
  if (reservation == nullptr) return nullptr;
  auto after = reservation->mappings.upper_bound(address);
  if (after == reservation->mappings.begin()) return nullptr;
  const auto& [first, mapping] = *std::prev(after);
  if (address - first >= mapping.num_bytes) return nullptr;
  return mapping.physical;
}

bool AddressSpace::accessible(CUdeviceptr address, std::size_t num_bytes, bool write) {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  return accessible_locked(address, num_bytes, write);
}

bool AddressSpace::accessible_locked(CUdeviceptr address, std::size_t num_bytes, bool write) {
  if (!on_device(address)) return address != 0;
  Reservation* const reservation = containing(address, num_bytes);
  if (reservation == nullptr) return false;
  const int needed = write ? CU_MEM_ACCESS_FLAGS_PROT_READWRITE : CU_MEM_ACCESS_FLAGS_PROT_READ;
  auto mapping = reservation->mappings.upper_bound(address);
  if (mapping == reservation->mappings.begin()) return false;
  --mapping;
  CUdeviceptr reached = address;
  while (reached < address + num_bytes) {
    if (mapping == reservation->mappings.end() || mapping->first > reached ||
        mapping->first + mapping->second.num_bytes <= reached) {
      return false;
    }
    const auto& access = mapping->second.access;
    const bool granted = std::any_of(access.begin(), access.end(), [needed](const auto& entry) {
      return (entry.second & needed) == needed;
    });
    if (!granted) return false;
    reached = mapping->first + mapping->second.num_bytes;
    ++mapping;
  }
  return true;
}

CUresult AddressSpace::copy(CUdeviceptr dst, CUdeviceptr src, std::size_t num_bytes) {
  for (std::size_t done = 0; done < num_bytes; done += kChunkBytes) {
    const std::size_t count = std::min(kChunkBytes, num_bytes - done);
    const std::shared_lock<std::shared_mutex> lock(mutex_);
    if (!accessible_locked(dst + done, count, /*write=*/true) ||
        !accessible_locked(src + done, count, /*write=*/false)) {
      return CUDA_ERROR_ILLEGAL_ADDRESS;
    }
    std::memmove(pointer(dst + done), pointer(src + done), count);
  }
  return CUDA_SUCCESS;
}

CUresult AddressSpace::fill(CUdeviceptr dst, unsigned int value, std::size_t width,
                            std::size_t count) {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  if (!accessible_locked(dst, count * width, /*write=*/true)) return CUDA_ERROR_ILLEGAL_ADDRESS;
  if (width == 1) {
    std::memset(pointer(dst), static_cast<int>(value), count);
  } else {
    auto* const words = static_cast<unsigned int*>(pointer(dst));
    std::fill(words, words + count, value);
  }
  return CUDA_SUCCESS;
}

std::size_t AddressSpace::num_reservations() {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  return reservations_.size();
}

std::size_t AddressSpace::num_mappings() {
  const std::shared_lock<std::shared_mutex> lock(mutex_);
  std::size_t count = 0;
  for (const auto& [_, reservation] : reservations_) count += reservation.mappings.size();
  return count;
}

}  // namespace standin
