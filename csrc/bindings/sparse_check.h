// Sizes of sparse weights, the same for torch tensors and numpy arrays: by the shapes of two of them, see SparseStorage.
#pragma once

#include "check.h"

namespace tersor {

struct Sizes {
  const int64_t* at;
  int64_t dim;
  bool is(std::initializer_list<int64_t> want) const {
    bool same = dim == static_cast<int64_t>(want.size());
    for (int64_t i = 0; same && i < dim; ++i) same = at[i] == want.begin()[i];
    return same;
  }
};

// Storage and entries of weight_packed and weight_index; their data, offset and sum are the caller's to set.
inline SparseWeights sparse_sizes(const char* function, const Sizes& packed, const Sizes& index, int64_t N, int64_t K) {
  SparseWeights s{};
  const int64_t first = packed.dim > 0 ? packed.at[0] : 0;
  if (packed.is({first, kTileBytes}) && index.is({first, 2})) {
    s.storage = SparseStorage::tiles;
    s.entries = first;
  } else if (packed.is({first, 2 * kTileBytes}) && index.is({0})) {
    s.storage = SparseStorage::windows;
    s.entries = first;
  } else if (packed.is({first}) && first >= kMaskSlack && index.is({ceil_div(N, kTileN), ceil_div(K, kTileK8), 8})) {
    s.storage = SparseStorage::masks;
    s.entries = first - kMaskSlack;
  } else if (packed.dim == 3) {
    fail(function, "weight_packed is stored for a GPU (pairs); on the CPU use another storage, as .to('cpu') of the layer does");
  } else {
    fail(function, "weight_packed and weight_index do not fit each other, N=", N, " and K=", K);
  }
  return s;
}

}  // namespace tersor
