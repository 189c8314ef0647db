// One hash of class I and E results, the same on every instruction set and every architecture: an Arm build that is equal to x86
// bit for bit finds the number below. Operands come from splitmix64 and exact arithmetic, so they are the same everywhere too.
#include "problem.h"

namespace tersor::test {
namespace {

constexpr uint64_t kDigest = 0x52e39b79b75eeac9;

class Digest {
 public:
  void add(const void* p, int64_t bytes) {  // FNV-1a
    for (int64_t i = 0; i < bytes; ++i) hash_ = (hash_ ^ static_cast<const uint8_t*>(p)[i]) * 0x100000001b3u;
  }
  uint64_t value() const { return hash_; }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

FloatRows normal_rows(int64_t M, int64_t K, Dtype dtype, Random& random) {
  return FloatRows(M, K, dtype, K, 1, [&](int64_t, int64_t) { return random.normal(); });
}

template <typename Call>
void add_layer(Digest& digest, int64_t M, const LinearWeights& w, Dtype dtype, Call call) {
  std::vector<char> y(static_cast<size_t>(M * w.N * dtype_bytes(dtype)));
  const char* error = call(Output{y.data(), dtype});
  if (CHECK(error == nullptr, "%s", error)) digest.add(y.data(), static_cast<int64_t>(y.size()));
}

// s8 tiles of a dense weight as sparse ones: kept tiles of every k step, or masks that are full.
void add_sparse(Digest& digest, const KernelTable& table, const Weights& w, const FloatRows& x, SparseStorage storage) {
  const int64_t tiles = ceil_div(w.N, kTileN), steps = ceil_div(w.K, kTileK8);
  const bool masks = storage == SparseStorage::masks;
  std::vector<uint8_t> packed(w.packed.data(), w.packed.data() + w.packed.size()), index;
  std::vector<int64_t> offset{0};
  std::vector<int32_t> sum(static_cast<size_t>(tiles * kTileN));
  for (uint8_t& code : packed) code ^= 128;  // pads become -128: K and N fill whole tiles here
  for (int64_t t = 0; t < tiles; ++t) {
    for (int64_t k = 0; k < steps; ++k) {
      const int64_t entry = masks ? -1 : k;
      for (int b = 0; b < (masks ? 64 : 16); b += 8) index.push_back(static_cast<uint8_t>(entry >> b));
    }
    offset.push_back((t + 1) * steps * (masks ? kTileBytes : 1));
  }
  const int64_t entries = offset.back();
  if (masks) packed.resize(packed.size() + kMaskSlack);
  for (int64_t n = 0; n < w.N; ++n) {
    for (int64_t k = 0; k < w.K; ++k) sum[static_cast<size_t>(n)] += w.w[static_cast<size_t>(n * w.K + k)];
  }
  const SparseWeights sparse{storage, packed.data(), entries, index.data(), offset.data(), sum.data()};
  LinearWeights args = w.args(Activation::none, true);
  args.weight_packed = nullptr;
  args.sparse = &sparse;
  add_layer(digest, x.M, args, x.dtype, [&](const Output& out) { return linear_dynamic(table, x.M, x.args(), args, out); });
}

uint64_t digest_of(const KernelTable& table) {
  Digest digest;
  Random random(20261124);
  for (int bits : kWidths) {
    for (Dtype dtype : kFloatDtypes) {
      const Weights w(53, 199, random, 0, bits);
      for (int64_t M : {1, 2, 7, 37}) {
        const FloatRows x = normal_rows(M, w.K, dtype, random);
        for (Activation a : {Activation::none, Activation::relu, Activation::gelu, Activation::gelu_tanh, Activation::silu}) {
          const LinearWeights args = w.args(a, true);
          add_layer(digest, M, args, dtype, [&](const Output& out) { return linear_dynamic(table, M, x.args(), args, out); });
        }
        if (bits > 1) continue;
        Exact<float> threshold(w.K);
        for (int64_t k = 0; k < w.K; ++k) threshold[k] = 0.1f * random.normal();
        LinearWeights args = w.args(Activation::none, true);
        args.threshold = threshold.data();
        add_layer(digest, M, args, dtype, [&](const Output& out) { return linear_xnor(table, M, x.args(), args, out); });
      }
    }
  }
  const Weights w(48, 256, random);
  for (int64_t M : {1, 6, 37}) {
    const FloatRows x = normal_rows(M, w.K, Dtype::f32, random);
    for (SparseStorage storage : {SparseStorage::tiles, SparseStorage::masks}) add_sparse(digest, table, w, x, storage);
  }
  return digest.value();
}

TERSOR_TEST(digest_is_the_same_everywhere) {
  for (const Kernels& k : runnable()) {
    set_case("%s", k.table.isa);
    const uint64_t got = digest_of(k.table);
    CHECK(got == kDigest, "the digest is 0x%llx, expected 0x%llx", static_cast<unsigned long long>(got),
          static_cast<unsigned long long>(kDigest));
  }
}

}  // namespace
}  // namespace tersor::test
