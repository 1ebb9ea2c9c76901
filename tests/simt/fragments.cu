// The fragment layouts on hardware: what test_simt_emulator.py checks of the emulator, on the GPU that the kernels run
// on. Prints one line and exits with 0 if all results are exact.
//
//   nvcc -std=c++17 -arch=native -I csrc/cuda/kernels -I tests/simt tests/simt/fragments.cu -o fragments && ./fragments
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "fragment_kernels.cuh"

using namespace fastconv;

namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  std::printf("wrong: %s\n", what);
  ++failures;
}

void check(cudaError_t e, const char* what) {
  if (e == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(e));
  std::exit(2);
}

// Device copies that live as long as the program: a few KB.
template <class T>
T* on_device(const std::vector<T>& host) {
  T* p = nullptr;
  check(cudaMalloc(&p, host.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpy(p, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "cudaMemcpy");
  return p;
}
template <class T>
std::vector<T> to_host(const T* p, size_t count) {
  std::vector<T> host(count);
  check(cudaMemcpy(host.data(), p, count * sizeof(T), cudaMemcpyDeviceToHost), "the kernel");
  return host;
}

// Small integers: every product and sum is exact. a[16][K] b[K][8] -> d[16][8]
template <class T, int K, class Kernel>
void mma(Kernel kernel, const char* what) {
  std::vector<T> a(16 * K), b(K * 8);
  std::srand(1);
  for (T& x : a) x = static_cast<T>(static_cast<float>(std::rand() % 9 - 4));
  for (T& x : b) x = static_cast<T>(static_cast<float>(std::rand() % 9 - 4));
  float* d = on_device(std::vector<float>(128, NAN));
  expect(launch(kernel, dim3(1), dim3(32), 0, nullptr, on_device(a), on_device(b), d).ok(), what);
  const std::vector<float> got = to_host(d, 128);
  bool same = true;
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float want = 0;
      for (int k = 0; k < K; ++k) want += static_cast<float>(a[i * K + k]) * static_cast<float>(b[k * 8 + j]);
      same = same && got[i * 8 + j] == want;
    }
  }
  expect(same, what);
}

void ldmatrix(int trans, int pitch) {
  std::vector<uint16_t> tiles(256);
  for (int i = 0; i < 256; ++i) tiles[i] = static_cast<uint16_t>(i);
  uint16_t* out = on_device(std::vector<uint16_t>(256, 0));
  expect(launch(ldmatrix_kernel, dim3(1), dim3(32), 0, nullptr, on_device(tiles), out, trans, pitch).ok(), "ldmatrix");
  const std::vector<uint16_t> got = to_host(out, 256);
  bool same = true;
  for (int lane = 0; lane < 32; ++lane) {
    for (int tile = 0; tile < 4; ++tile) {
      for (int e = 0; e < 2; ++e) {
        const int row = trans ? lane % 4 * 2 + e : lane / 4, col = trans ? lane / 4 : lane % 4 * 2 + e;
        same = same && got[lane * 8 + tile * 2 + e] == tiles[tile * 64 + row * 8 + col];
      }
    }
  }
  expect(same, trans ? "ldmatrix.trans" : "ldmatrix");
}

void cp_async() {
  std::vector<float> in(64);
  for (int i = 0; i < 64; ++i) in[i] = static_cast<float>(i);
  float* out = on_device(std::vector<float>(64, -1.0f));
  expect(launch(fault_kernel, dim3(1), dim3(64), 64 * sizeof(float), nullptr, on_device(in), out, 0).ok(), "cp.async");
  const std::vector<float> got = to_host(out, 64);
  bool same = true;
  for (int i = 0; i < 64; ++i) same = same && got[i] == in[63 - i];
  expect(same, "cp.async");
}

}  // namespace

int main() {
  mma<__half, 16>(mma16_kernel<__half>, "mma.m16n8k16 fp16");
  mma<__nv_bfloat16, 16>(mma16_kernel<__nv_bfloat16>, "mma.m16n8k16 bf16");
  mma<float, 8>(mma_tf32_kernel, "mma.m16n8k8 tf32");
  for (int trans : {0, 1}) {
    for (int pitch : {8, 64}) ldmatrix(trans, pitch);
  }
  cp_async();
  if (failures == 0) std::printf("fragments: every layout as documented\n");
  return failures != 0;
}
