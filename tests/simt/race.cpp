// A program for ThreadSanitizer (sanitize.py tsan): the convolution pipelines, whose barriers and cp.async waits guard
// the ring of shared-memory stages, on a few shapes. Values do not matter here; the order of the accesses does.
#include <vector>

#include "driver_conv.cpp"

static int run(int kind, int tile, int splits, ConvShape g, bool prologue, uint64_t seed) {
  using T = __nv_bfloat16;
  auto tensor = [](int64_t n) { return std::vector<T>(static_cast<size_t>(n), from_float<T>(1.0f)); };
  std::vector<T> x = tensor(static_cast<int64_t>(g.n) * g.h * g.w * g.c),
                 y = tensor(static_cast<int64_t>(g.n) * g.p * g.q * g.k);
  std::vector<T> w = tensor(static_cast<int64_t>(g.k) * g.r * g.s * g.c / g.groups);
  std::vector<float> ones(g.c, 1.0f), partial(splits * (x.size() + y.size() + w.size()));
  std::vector<float> mean(y.size()), m2(y.size());
  ConvCall c{};
  c.a = kind == 0 ? x.data() : y.data();
  c.b = kind == 2 ? x.data() : w.data();
  std::vector<T> out = kind == 0 ? y : (kind == 1 ? x : w);
  c.out = out.data();
  c.partial = partial.data();
  if (prologue) c.pro_scale = c.pro_shift = ones.data();
  if (kind == 0 && splits == 1) c.stat_mean = mean.data(), c.stat_m2 = m2.data();
  c.shape = g;
  c.dtype = 2, c.tile = tile, c.splits = splits, c.tensor = 1, c.kind = kind;
  simt_seed(seed);
  if (simt_conv(&c) == 0) return 0;
  std::fprintf(stderr, "kind %d tile %d: %s\n", kind, tile, simt_error());
  return 1;
}

int main() {
  const ConvShape aligned{2, 5, 5, 40, 72, 3, 3, 5, 5, 1, 1, 1, 1, 1, 1, 1},
      odd{1, 4, 4, 5, 9, 3, 3, 4, 4, 1, 1, 1, 1, 1, 1, 1};
  int failed = 0, runs = 0;
  for (uint64_t seed = 0; seed < 2; ++seed)
    for (const ConvShape& g : {aligned, odd}) {
      for (int tile : {0, 2, 4})
        for (int kind = 0; kind < 2; ++kind) failed += run(kind, tile, 1, g, false, seed), ++runs;
      failed += run(0, 2, 1, g, true, seed) + run(0, 2, 2, g, false, seed) + run(2, 0, 1, g, false, seed) +
                run(2, 1, 2, g, false, seed);
      runs += 4;
    }
  std::printf("%d launches, %d failed\n", runs, failed);
  return failed != 0;
}
