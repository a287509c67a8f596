// CUDA kernels on the CPU, for tests: g++ -x c++ -std=c++17 -include cuda_on_cpu.h runs the very text that NVRTC compiles.
//
// One block at a time on one OS thread; every CUDA thread is a ucontext fiber, and they take turns at barriers, shuffles and
// __syncwarp. So barriers wait, shared memory starts as garbage, and a launch says when threads of a block passed different
// numbers of barriers. Warp shuffles assume that all 32 lanes take part. Some microseconds a thread: keep grids small.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static /* one block runs at a time */
#define FN inline

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace on_cpu {
struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done = true, waiting = false;
  dim3 place;
  int barriers = 0;
};
inline ucontext_t home;
inline std::vector<Fiber> fibers;
inline int current = 0;
inline std::function<void()> body;
inline std::vector<uint4> pool;
inline std::vector<uint64_t> exchange;

inline void yield() { swapcontext(&fibers[current].context, &home); }
inline void run_body() {
  body();
  fibers[current].done = true;
  swapcontext(&fibers[current].context, &home);
}
}  // namespace on_cpu

inline dim3 blockIdx, blockDim, gridDim;
#define threadIdx (on_cpu::fibers[on_cpu::current].place)

inline void __syncthreads() {  // resumed when every live thread of the block has arrived
  on_cpu::Fiber& me = on_cpu::fibers[on_cpu::current];
  ++me.barriers;
  me.waiting = true;
  on_cpu::yield();
}
inline void __syncwarp(unsigned = ~0u) { on_cpu::yield(); }
template <class T> T __shfl_sync(unsigned, T value, int source) {
  const int me = on_cpu::current;
  std::memcpy(&on_cpu::exchange[me], &value, sizeof value);
  on_cpu::yield();
  T result;
  std::memcpy(&result, &on_cpu::exchange[(me & ~31) | (source & 31)], sizeof result);
  on_cpu::yield();
  return result;
}
template <class T> T __shfl_xor_sync(unsigned all, T value, int mask) {
  return __shfl_sync(all, value, (on_cpu::current & 31) ^ mask);
}
template <class T> T __shfl_up_sync(unsigned all, T value, int distance) {
  const int lane = on_cpu::current & 31;
  return __shfl_sync(all, value, lane >= distance ? lane - distance : lane);
}
inline unsigned atomicOr(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at |= value;
  return old;
}
inline unsigned atomicMax(unsigned* at, unsigned value) {
  const unsigned old = *at;
  *at = std::max(old, value);
  return old;
}
template <class T> T __ldg(const T* at) { return *at; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)((((uint64_t)high << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return (unsigned)(((uint64_t)high << 32 | low) >> (shift & 31));
}
inline float __uint_as_float(unsigned x) {
  float f;
  std::memcpy(&f, &x, sizeof f);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned x;
  std::memcpy(&x, &f, sizeof x);
  return x;
}

// What common.cuh takes from PTX.
inline void* dynamic_shared() { return on_cpu::pool.data(); }
inline unsigned prmt(unsigned a, unsigned b, unsigned selector) {
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> 4 * i & 15, byte = ((nibble & 4 ? b : a) >> 8 * (nibble & 3)) & 255;
    r |= (nibble & 8 ? (byte >> 7) * 255 : byte) << 8 * i;
  }
  return r;
}
inline uint16_t half_bits(float x) {
  const unsigned bits = __float_as_uint(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return (uint16_t)0x7fff;
  if (size >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  // In units of the last place that float16 has there, an addition rounds to nearest even.
  const int exponent = std::max((int)(size >> 23), 113);
  const float unit = std::ldexp(1.0f, exponent - 127 - 10), steps = std::nearbyint(__uint_as_float(size) / unit);
  return (uint16_t)(sign | ((unsigned)(exponent - 113) * 1024 + (unsigned)steps));
}
inline float half_value(uint16_t bits) {
  const unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
  if (exponent == 31) return __uint_as_float(mantissa ? 0x7fffffffu : sign | 0x7f800000u);
  if (exponent) return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
  const float size = std::ldexp((float)mantissa, -24);
  return sign ? -size : size;
}

namespace on_cpu {
// Runs a grid. 0, or 1 if threads of one block met different numbers of barriers.
template <class... A> int launch(void (*kernel)(A...), const unsigned* grid, const unsigned* block, size_t shared, A... args) {
  const int count = block[0] * block[1] * block[2];
  if ((int)fibers.size() != count) fibers.resize(count);
  exchange.assign(count + 32, 0);
  body = [=] { kernel(args...); };
  gridDim = dim3(grid[0], grid[1], grid[2]), blockDim = dim3(block[0], block[1], block[2]);
  int divergent = 0;
  for (unsigned z = 0; z < gridDim.z; ++z)
    for (unsigned y = 0; y < gridDim.y; ++y)
      for (unsigned x = 0; x < gridDim.x; ++x) {
        blockIdx = dim3(x, y, z);
        pool.assign(shared / 16 + 1, uint4{0xa5a5a5a5u, 0xa5a5a5a5u, 0xa5a5a5a5u, 0xa5a5a5a5u});
        for (int i = 0; i < count; ++i) {
          Fiber& fiber = fibers[i];
          fiber.stack.resize(64 << 10);
          fiber.done = fiber.waiting = false, fiber.barriers = 0;
          fiber.place = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = fiber.stack.size();
          fiber.context.uc_link = &home;
          makecontext(&fiber.context, run_body, 0);
        }
        for (int live = count; live;) {
          live = 0;
          bool moved = false;
          for (int i = 0; i < count; ++i)
            if (!fibers[i].done && !fibers[i].waiting) {
              current = i;
              swapcontext(&home, &fibers[i].context);
              moved = true;
            }
          for (Fiber& fiber : fibers) {
            live += !fiber.done;
            if (!moved) fiber.waiting = false;
          }
        }
        for (const Fiber& fiber : fibers) divergent |= fiber.barriers != fibers[0].barriers;
      }
  return divergent;
}
// As the driver's: one pointer to each argument.
template <class... A, size_t... I>
int unpack(void (*kernel)(A...), const unsigned* grid, const unsigned* block, size_t shared, void** args, std::index_sequence<I...>) {
  return launch<A...>(kernel, grid, block, shared, *(A*)args[I]...);
}
template <class... A>
int launch_packed(void (*kernel)(A...), const unsigned* grid, const unsigned* block, size_t shared, void** args) {
  return unpack(kernel, grid, block, shared, args, std::index_sequence_for<A...>());
}
}  // namespace on_cpu
