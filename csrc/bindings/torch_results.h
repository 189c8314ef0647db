// Where an op of torch writes: to new tensors, or to those that the caller of its .out overload gives.
#pragma once

#include "torch_check.h"

namespace {

// Tensors for the results of the call that runs, in their order; null: results are new.
struct GivenResults {
  std::vector<Tensor> tensors;
  size_t next = 0;
};
inline thread_local GivenResults* given_results = nullptr;

// The tensor for the next result of an op.
inline Tensor result(const std::vector<int64_t>& sizes, ScalarType type) {
  if (!given_results) return empty(sizes, type);
  const size_t at = given_results->next++;
  const Tensor& t = given_results->tensors[at];
  check_plain("out", "a result", t);
  const auto have = t.sizes();
  bool same = t.scalar_type() == type && t.is_contiguous() && have.size() == sizes.size();
  for (size_t i = 0; same && i < sizes.size(); ++i) same = have[i] == sizes[i];
  if (!same || misaligned(t)) {
    std::ostringstream text;
    for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
    fail("out", "out", at, " must be contiguous ", torch::headeronly::toString(type), " [", text.str(), "]");
  }
  return t;
}

// The .out overload of a boxed kernel: the last kResults arguments are what it writes to, and nothing is returned.
template <void (*kBoxed)(StableIValue*, uint64_t, uint64_t), uint64_t kResults>
void boxed_out(StableIValue* stack, uint64_t num_args, uint64_t) {
  GivenResults given;
  for (uint64_t i = num_args - kResults; i < num_args; ++i) given.tensors.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  struct Scope {
    explicit Scope(GivenResults* given) { given_results = given; }
    ~Scope() { given_results = nullptr; }
  } scope(&given);
  kBoxed(stack, num_args - kResults, kResults);
  for (uint64_t i = 0; i < kResults; ++i) torch::stable::detail::to<Tensor>(stack[i]);  // owned by the stack, not asked for
}

}  // namespace
