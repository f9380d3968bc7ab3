// Copies and fills, one by one and in batches.
#include <algorithm>
#include <random>

#include "core.hpp"
#include "memory.hpp"
#include "stream.hpp"

namespace standin {
namespace {

struct Copy {
  CUdeviceptr dst;
  CUdeviceptr src;
  std::size_t num_bytes;
};

// What the driver finds out at the time of the call.
bool plausible(const Copy& copy) {
  AddressSpace& space = AddressSpace::instance();
  return space.accessible(copy.dst, copy.num_bytes, /*write=*/true) &&
         space.accessible(copy.src, copy.num_bytes, /*write=*/false);
}

CUresult copy_async(CUdeviceptr dst, CUdeviceptr src, std::size_t num_bytes, CUstream stream) {
  const Copy copy{dst, src, num_bytes};
  if (num_bytes == 0) return CUDA_SUCCESS;
  if (!plausible(copy)) return CUDA_ERROR_INVALID_VALUE;
  return submit(stream, CU_GRAPH_NODE_TYPE_MEMCPY, [copy] {
    return AddressSpace::instance().copy(copy.dst, copy.src, copy.num_bytes);
  });
}

// In the legacy stream, and finished on return.
CUresult copy_now(CUdeviceptr dst, CUdeviceptr src, std::size_t num_bytes) {
  STANDIN_TRY(check_capture_allows());
  STANDIN_TRY(copy_async(dst, src, num_bytes, nullptr));
  return synchronize_legacy();
}

CUresult fill_async(CUdeviceptr dst, unsigned int value, std::size_t width, std::size_t count,
                    CUstream stream) {
  if (count == 0) return CUDA_SUCCESS;
  if (!AddressSpace::instance().accessible(dst, count * width, /*write=*/true)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  return submit(stream, CU_GRAPH_NODE_TYPE_MEMSET, [dst, value, width, count] {
    return AddressSpace::instance().fill(dst, value, width, count);
  });
}

CUresult fill_now(CUdeviceptr dst, unsigned int value, std::size_t width, std::size_t count) {
  STANDIN_TRY(check_capture_allows());
  STANDIN_TRY(fill_async(dst, value, width, count, nullptr));
  return synchronize_legacy();
}

// The attributes of every copy, or INVALID_VALUE where they do not cover the batch as documented.
CUresult access_orders(const CUmemcpyAttributes* attrs, const size_t* indices, size_t num_attrs,
                       size_t count, std::vector<CUmemcpySrcAccessOrder>* orders) {
  if (num_attrs == 0 || num_attrs > count || indices[0] != 0) return CUDA_ERROR_INVALID_VALUE;
  for (size_t i = 0; i < num_attrs; ++i) {
    const size_t end = i + 1 < num_attrs ? indices[i + 1] : count;
    const auto order = attrs[i].srcAccessOrder;
    if (indices[i] >= end || end > count || order < CU_MEMCPY_SRC_ACCESS_ORDER_STREAM ||
        order > CU_MEMCPY_SRC_ACCESS_ORDER_ANY ||
        (attrs[i].flags & ~static_cast<unsigned>(CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE)) !=
            0) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    orders->insert(orders->end(), end - indices[i], order);
  }
  return CUDA_SUCCESS;
}

// A copy whose source may be read before the stream's earlier work, and here is.
Action early_copy(const Copy& copy) {
  const auto bytes = std::make_shared<std::vector<unsigned char>>(copy.num_bytes);
  const CUresult result = AddressSpace::instance().copy(
      reinterpret_cast<CUdeviceptr>(bytes->data()), copy.src, copy.num_bytes);
  return [copy, bytes, result] {
    STANDIN_TRY(result);
    return AddressSpace::instance().copy(copy.dst, reinterpret_cast<CUdeviceptr>(bytes->data()),
                                         copy.num_bytes);
  };
}

CUresult copy_batch(const CUdeviceptr* dsts, const CUdeviceptr* srcs, const size_t* sizes,
                    size_t count, const CUmemcpyAttributes* attrs, const size_t* indices,
                    size_t num_attrs, size_t* failed, CUstream stream) {
  if (stream == nullptr || stream == CU_STREAM_LEGACY) return CUDA_ERROR_INVALID_VALUE;
  std::shared_ptr<Stream> found;
  STANDIN_TRY(find_stream(stream, &found));
  {
    const std::lock_guard<std::mutex> lock(api_mutex());
    // The real driver refuses as well, and leaves the capture valid.
    if (found->capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  std::vector<CUmemcpySrcAccessOrder> orders;
  STANDIN_TRY(access_orders(attrs, indices, num_attrs, count, &orders));
  for (size_t i = 0; i < count; ++i) {
    const Copy copy{dsts[i], srcs[i], sizes[i]};
    if (copy.num_bytes > 0 && plausible(copy)) continue;
    if (failed != nullptr) *failed = i;
    return CUDA_ERROR_INVALID_VALUE;
  }
  std::mt19937_64 random(new_handle());
  std::vector<Action> copies;
  for (size_t i = 0; i < count; ++i) {
    const Copy copy{dsts[i], srcs[i], sizes[i]};
    const bool early = orders[i] == CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL ||
                       (orders[i] == CU_MEMCPY_SRC_ACCESS_ORDER_ANY && random() % 2 == 0);
    if (early) {
      copies.push_back(early_copy(copy));
    } else {
      copies.emplace_back(
          [copy] { return AddressSpace::instance().copy(copy.dst, copy.src, copy.num_bytes); });
    }
  }
  // Within a batch, copies run in any order.
  std::shuffle(copies.begin(), copies.end(), random);
  return submit(stream, CU_GRAPH_NODE_TYPE_MEMCPY, [copies = std::move(copies)] {
    for (const Action& copy : copies) STANDIN_TRY(copy());
    return CUDA_SUCCESS;
  });
}

}  // namespace

CUresult memcpy_batch_v12080(CUdeviceptr* dsts, CUdeviceptr* srcs, size_t* sizes, size_t count,
                             CUmemcpyAttributes* attrs, size_t* attrsIdxs, size_t numAttrs,
                             size_t* failIdx, CUstream hStream) {
  if (const CUresult fault = enter("cuMemcpyBatchAsync"); fault != CUDA_SUCCESS) return fault;
  if (failIdx == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *failIdx = SIZE_MAX;
  return copy_batch(dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, failIdx, hStream);
}

CUresult memcpy_batch_v13000(CUdeviceptr* dsts, CUdeviceptr* srcs, size_t* sizes, size_t count,
                             CUmemcpyAttributes* attrs, size_t* attrsIdxs, size_t numAttrs,
                             CUstream hStream) {
  if (const CUresult fault = enter("cuMemcpyBatchAsync"); fault != CUDA_SUCCESS) return fault;
  return copy_batch(dsts, srcs, sizes, count, attrs, attrsIdxs, numAttrs, nullptr, hStream);
}

}  // namespace standin

CUresult cuMemcpy(CUdeviceptr dst, CUdeviceptr src, size_t ByteCount) {
  STANDIN_ENTER();
  return standin::copy_now(dst, src, ByteCount);
}

CUresult cuMemcpyHtoD(CUdeviceptr dstDevice, const void* srcHost, size_t ByteCount) {
  STANDIN_ENTER();
  return standin::copy_now(dstDevice, reinterpret_cast<CUdeviceptr>(srcHost), ByteCount);
}

CUresult cuMemcpyDtoH(void* dstHost, CUdeviceptr srcDevice, size_t ByteCount) {
  STANDIN_ENTER();
  return standin::copy_now(reinterpret_cast<CUdeviceptr>(dstHost), srcDevice, ByteCount);
}

CUresult cuMemcpyDtoD(CUdeviceptr dstDevice, CUdeviceptr srcDevice, size_t ByteCount) {
  STANDIN_ENTER();
  return standin::copy_now(dstDevice, srcDevice, ByteCount);
}

CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t ByteCount, CUstream hStream) {
  STANDIN_ENTER();
  return standin::copy_async(dst, src, ByteCount, hStream);
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr dstDevice, const void* srcHost, size_t ByteCount,
                           CUstream hStream) {
  STANDIN_ENTER();
  return standin::copy_async(dstDevice, reinterpret_cast<CUdeviceptr>(srcHost), ByteCount, hStream);
}

CUresult cuMemcpyDtoHAsync(void* dstHost, CUdeviceptr srcDevice, size_t ByteCount,
                           CUstream hStream) {
  STANDIN_ENTER();
  return standin::copy_async(reinterpret_cast<CUdeviceptr>(dstHost), srcDevice, ByteCount, hStream);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr dstDevice, CUdeviceptr srcDevice, size_t ByteCount,
                           CUstream hStream) {
  STANDIN_ENTER();
  return standin::copy_async(dstDevice, srcDevice, ByteCount, hStream);
}

CUresult cuMemsetD8(CUdeviceptr dstDevice, unsigned char uc, size_t N) {
  STANDIN_ENTER();
  return standin::fill_now(dstDevice, uc, 1, N);
}

CUresult cuMemsetD32(CUdeviceptr dstDevice, unsigned int ui, size_t N) {
  STANDIN_ENTER();
  return standin::fill_now(dstDevice, ui, 4, N);
}

CUresult cuMemsetD8Async(CUdeviceptr dstDevice, unsigned char uc, size_t N, CUstream hStream) {
  STANDIN_ENTER();
  return standin::fill_async(dstDevice, uc, 1, N, hStream);
}

CUresult cuMemsetD32Async(CUdeviceptr dstDevice, unsigned int ui, size_t N, CUstream hStream) {
  STANDIN_ENTER();
  return standin::fill_async(dstDevice, ui, 4, N, hStream);
}
