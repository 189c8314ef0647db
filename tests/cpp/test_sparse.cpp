// Sparse weights: the drivers against the dense integer sums (class I and E) and a sum in double (class F), and bytes that no
// weight gives, which must not lead a kernel outside of its arrays. Every buffer ends where its data end.
#include "problem.h"

namespace tersor::test {
namespace {

long long ll(int64_t v) { return v; }

constexpr int64_t kRows[] = {1, 2, 3, 4, 5, 8, 9, 17, 35}, kChannels[] = {1, 16, 37};
constexpr double kDensities[] = {0.0, 0.05, 0.4, 1.0};
constexpr const char* kStorageNames[] = {"tiles", "masks", "windows"};
constexpr SparseStorage kStorages[] = {SparseStorage::tiles, SparseStorage::masks, SparseStorage::windows};

void put_u16(std::vector<uint8_t>& out, int64_t v) {
  out.push_back(static_cast<uint8_t>(v & 255));
  out.push_back(static_cast<uint8_t>(v >> 8));
}

// An int8 weight with zeros, as it is stored.
struct SparseInt8 {
  int64_t N, K;
  std::vector<int8_t> w;  // [N][K]
  SparseStorage storage;
  Exact<uint8_t> packed, index;
  Exact<int64_t> offset;
  Exact<int32_t> sum;
  Exact<float> scale, bias;

  int8_t at(int64_t n, int64_t k) const { return n < N && k < K ? w[static_cast<size_t>(n * K + k)] : int8_t{0}; }

  SparseInt8(int64_t n, int64_t k, double density, SparseStorage s, Random& random)
      : N(n), K(k), w(static_cast<size_t>(n * k)), storage(s), scale(n), bias(n) {
    for (int64_t i = 0; i < N * K; ++i) {
      const bool empty = i / K / kTileN == 1 || random.unit() >= density;
      w[static_cast<size_t>(i)] = empty ? int8_t{0} : static_cast<int8_t>(random.coin() ? 127 : random.between(-127, 127));
    }
    const int64_t tiles = ceil_div(N, kTileN);
    std::vector<uint8_t> bytes, places;
    std::vector<int64_t> offsets{0};
    std::vector<int32_t> sums;
    for (int64_t t = 0; t < tiles; ++t) {
      for (int64_t c = t * kTileN; c < (t + 1) * kTileN; ++c) {
        sums.push_back(0);
        for (int64_t j = 0; j < K; ++j) sums.back() += at(c, j);
      }
      s == SparseStorage::windows ? add_windows(t, bytes) : add_tiles(t, bytes, places);
      const int64_t entry = s == SparseStorage::tiles ? kTileBytes : s == SparseStorage::masks ? 1 : 2 * kTileBytes;
      offsets.push_back(static_cast<int64_t>(bytes.size()) / entry);
    }
    if (s == SparseStorage::masks) bytes.resize(bytes.size() + kMaskSlack);
    packed = Exact<uint8_t>(bytes);
    index = Exact<uint8_t>(places);
    offset = Exact<int64_t>(offsets);
    sum = Exact<int32_t>(sums);
    for (int64_t i = 0; i < N; ++i) {
      scale[i] = static_cast<float>(0.001 + 0.02 * random.unit());
      bias[i] = 3.0f * random.normal();
    }
  }

  int64_t entries() const {
    return storage == SparseStorage::tiles   ? packed.size() / kTileBytes
           : storage == SparseStorage::masks ? packed.size() - kMaskSlack
                                             : packed.size() / (2 * kTileBytes);
  }
  SparseWeights args() const { return {storage, packed.data(), entries(), index.data(), offset.data(), sum.data()}; }
  LinearWeights layer(const SparseWeights* sparse) const {
    LinearWeights l{};
    l.N = N;
    l.K = K;
    l.weight_scale = scale.data();
    l.bias = bias.data();
    l.bias_dtype = Dtype::f32;
    l.activation = Activation::none;
    l.sparse = sparse;
    return l;
  }

 private:
  void add_tiles(int64_t t, std::vector<uint8_t>& bytes, std::vector<uint8_t>& places) const {
    for (int64_t step = 0; step < ceil_div(K, kTileK8); ++step) {
      uint64_t mask = 0;
      std::vector<uint8_t> tile;
      for (int64_t i = 0; i < kTileBytes; ++i) {
        const int8_t v = at(t * kTileN + i / 4, step * 4 + i % 4);
        if (v) mask |= uint64_t{1} << i;
        if (v || storage == SparseStorage::tiles) tile.push_back(static_cast<uint8_t>(v));
      }
      if (storage == SparseStorage::masks) {
        for (int b = 0; b < 64; b += 8) places.push_back(static_cast<uint8_t>(mask >> b));
      } else if (mask) {
        put_u16(places, step);
      } else {
        continue;
      }
      bytes.insert(bytes.end(), tile.begin(), tile.end());
    }
  }
  void add_windows(int64_t t, std::vector<uint8_t>& bytes) const {
    std::vector<int64_t> next(kTileN, 0);
    while (true) {
      int64_t begin = K;
      for (int64_t c = 0; c < kTileN; ++c) {
        int64_t& k = next[static_cast<size_t>(c)];
        while (k < K && !at(t * kTileN + c, k)) ++k;
        begin = k < begin ? k : begin;
      }
      if (begin >= K) return;
      begin = begin / kWindowStep * kWindowStep;
      std::vector<uint8_t> entry(2 * kTileBytes);
      for (int64_t c = 0; c < kTileN; ++c) {
        int64_t& k = next[static_cast<size_t>(c)];
        for (int64_t i = 0; i < 4 && k < K && k < begin + kWindowK; ++k) {
          if (const int8_t v = at(t * kTileN + c, k)) {
            entry[static_cast<size_t>(4 * c + i)] = static_cast<uint8_t>(k - begin);
            entry[static_cast<size_t>(kTileBytes + 4 * c + i)] = static_cast<uint8_t>(v);
            ++i;
          }
        }
      }
      for (int64_t i = 0; i < 16; ++i) {
        if (begin / kWindowStep >> i & 1) entry[static_cast<size_t>(i)] |= 128;
      }
      bytes.insert(bytes.end(), entry.begin(), entry.end());
    }
  }
};

FloatRows rows_of(int64_t M, int64_t K, Random& random) {
  return FloatRows(M, K, Dtype::f32, K, 1, [&](int64_t, int64_t) { return random.normal(); });
}

template <typename Call>
void on_variants(const char* what, int64_t M, int64_t N, int64_t K, Call call) {
  for (const Kernels& k : runnable()) {
    for (int64_t threads : {1, 3}) {
      set_case("%s %s M=%lld N=%lld K=%lld, %lld threads", k.table.isa, what, ll(M), ll(N), ll(K), ll(threads));
      const Threads pool(threads);
      Canvas y(1, M * N * 4, M * N * 4, 4);
      const char* error = on_fresh_thread([&] { return call(k.table, Output{y.at(), Dtype::f32}); });
      CHECK(error == nullptr, "%s: %s", what, error);
      CHECK(y.intact(), "writes outside y");
    }
  }
}

void check_int8(int64_t M, int64_t N, int64_t K, double density, SparseStorage storage, Random& random) {
  const SparseInt8 w(N, K, density, storage, random);
  const FloatRows x = rows_of(M, K, random);
  std::vector<float> want;
  for (int64_t m = 0; m < M; ++m) {
    const QuantizedRow row = quantize_row(x.row(m), K, nullptr);
    for (int64_t n = 0; n < N; ++n) {
      int32_t acc = 0;
      for (int64_t k = 0; k < K; ++k) acc += row.q[static_cast<size_t>(k)] * w.at(n, k);
      want.push_back(before_activation(acc, row.scale, w.scale[n], &w.bias[n]));
    }
  }
  const SparseWeights sparse = w.args();
  const LinearWeights layer = w.layer(&sparse);
  on_variants(kStorageNames[static_cast<int>(storage)], M, N, K, [&](const KernelTable& table, const Output& out) {
    const char* error = linear_dynamic(table, M, x.args(), layer, out);
    CHECK_SAME("y", static_cast<const float*>(out.y), want.data(), static_cast<int64_t>(want.size()));
    return error;
  });
}

// A float weight with zeros, as it is stored.
struct SparseFloat {
  std::vector<float> w;
  Exact<uint8_t> values, index;
  Exact<int64_t> offset;
  SparseFloat(int64_t N, int64_t K, double density, Random& random) : w(static_cast<size_t>(N * K)) {
    std::vector<uint8_t> bytes, places;
    std::vector<int64_t> offsets{0};
    for (int64_t n = 0; n < N; ++n) {
      for (int64_t k = 0; k < K; ++k) {
        if (n == 2 || random.unit() >= density) continue;
        const float v = random.normal();
        w[static_cast<size_t>(n * K + k)] = v;
        uint8_t raw[4];
        std::memcpy(raw, &v, 4);
        bytes.insert(bytes.end(), raw, raw + 4);
        put_u16(places, k);
      }
      offsets.push_back(static_cast<int64_t>(places.size()) / 2);
    }
    values = Exact<uint8_t>(bytes, 1);
    index = Exact<uint8_t>(places, 1);
    offset = Exact<int64_t>(offsets);
  }
  SparseFloatWeights args() const { return {values.data(), index.data(), offset.data(), index.size() / 2}; }
};

// Z products and Z sums of a channel round once each: 2 Z kU of the sum of magnitudes.
void check_float(int64_t M, int64_t N, int64_t K, double density, Random& random) {
  const SparseFloat w(N, K, density, random);
  const FloatRows x = rows_of(M, K, random);
  std::vector<Bounded> want;
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0, magnitude = 0, count = 0;
      for (int64_t k = 0; k < K; ++k) {
        const double part = static_cast<double>(x.row(m)[k]) * w.w[static_cast<size_t>(n * K + k)];
        sum += part;
        magnitude += std::fabs(part);
        count += part != 0;
      }
      want.push_back({sum, 1.01 * 2 * count * kU * magnitude + 1e-37});
    }
  }
  const SparseFloatWeights sparse = w.args();
  LinearWeights layer{};
  layer.N = N;
  layer.K = K;
  layer.activation = Activation::none;
  layer.sparse_float = &sparse;
  on_variants("sparse float", M, N, K, [&](const KernelTable& table, const Output& out) {
    const char* error = linear_weight_only(table, M, x.args(), layer, out);
    for (size_t i = 0; i < want.size(); ++i) {
      CHECK(within(out.y, Dtype::f32, static_cast<int64_t>(i), want[i]), "y[%zu] is %.9g, expected %.9g within %.3g", i,
            static_cast<double>(load_float(out.y, Dtype::f32, static_cast<int64_t>(i))), want[i].value, want[i].bound);
    }
    return error;
  });
}

template <typename T>
void spoil(Exact<T>& data, Random& random) {
  auto* bytes = reinterpret_cast<uint8_t*>(data.data());
  const int64_t size = data.size() * static_cast<int64_t>(sizeof(T));
  for (int64_t i = 0; i < size; ++i) {
    if (random.coin()) bytes[i] = static_cast<uint8_t>(random.bits());
  }
}

}  // namespace

TERSOR_TEST(sparse_int8_shapes) {
  Random random(options.seed);
  int64_t i = 0;
  for (SparseStorage storage : kStorages) {
    for (int64_t K : {1, 3, 4, 63, 64, 65, 127, 129, 300, 1030}) {
      for (int64_t N : {1, 16, 37}) {
        check_int8(kRows[i % 9], N, K, kDensities[i / 3 % 4], storage, random);
        ++i;
      }
    }
    for (int64_t M : {1, 2, 3, 4, 5, 6, 7, 8, 9, 40}) check_int8(M, 50, 200, 0.2, storage, random);
  }
}

TERSOR_TEST(sparse_float_shapes) {
  Random random(options.seed);
  int64_t i = 0;
  for (int64_t K : {1, 3, 16, 17, 100, 333}) {
    for (int64_t M : {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 70}) {
      check_float(M, kChannels[i % 3], K, kDensities[i / 3 % 4], random);
      ++i;
    }
  }
  check_float(70, 18, 5000, 0.05, random);  // fewer rows at a time
  check_float(20, 17, 20000, 0.01, random);
}

TERSOR_TEST(sparse_garbage_stays_inside) {
  Random random(options.seed);
  for (int turn = 0; turn < 12; ++turn) {
    for (SparseStorage storage : kStorages) {
      const int64_t N = random.between(1, 50), K = random.between(1, 300), M = random.pick<int64_t>({1, 2, 5, 9});
      SparseInt8 w(N, K, random.pick({0.0, 0.1, 0.7}), storage, random);
      spoil(w.index, random);
      if (random.coin()) spoil(w.offset, random);
      if (random.coin()) spoil(w.packed, random);
      for (int64_t i = 0; i < w.offset.size() && random.coin(); ++i) w.offset[i] = random.between(-3, w.entries() + 3);
      const FloatRows x = rows_of(M, K, random);
      const SparseWeights sparse = w.args();
      const LinearWeights layer = w.layer(&sparse);
      on_variants(kStorageNames[static_cast<int>(storage)], M, N, K,
                  [&](const KernelTable& table, const Output& out) { return linear_dynamic(table, M, x.args(), layer, out); });
    }
    const int64_t N = random.between(1, 40), K = random.between(1, 300), M = random.pick<int64_t>({1, 2, 17});
    SparseFloat w(N, K, 0.2, random);
    spoil(w.index, random);
    spoil(w.offset, random);
    const FloatRows x = rows_of(M, K, random);
    const SparseFloatWeights sparse = w.args();
    LinearWeights layer{};
    layer.N = N;
    layer.K = K;
    layer.activation = Activation::relu;
    layer.sparse_float = &sparse;
    on_variants("sparse float", M, N, K,
                [&](const KernelTable& table, const Output& out) { return linear_weight_only(table, M, x.args(), layer, out); });
  }
}

}  // namespace tersor::test
