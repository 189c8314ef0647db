// The kernels on numpy arrays and the facts about this CPU, without torch. python/tersor/numpy.py is the public face: it checks and
// documents; here sizes are verified once more before a pointer is passed on.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <string>

#include "../core/fused.h"
#include "../core/huge_pages.h"
#include "check.h"
#include "sparse_check.h"

namespace py = pybind11;

namespace {

using tersor::Dtype;
using tersor::fail;

bool is_f16(const py::array& a) { return a.dtype().kind() == 'f' && a.itemsize() == 2; }
bool is_f32(const py::array& a) { return a.dtype().kind() == 'f' && a.itemsize() == 4; }

struct XRows {
  int64_t M, K;
  tersor::StridedRows rows;
};

XRows rows_of(const char* function, const py::array& x) {
  if (x.ndim() != 2) fail(function, "x has ", x.ndim(), " dimensions, expected [M, K]");
  if (!is_f32(x) && !is_f16(x)) fail(function, "x has dtype ", std::string(py::str(x.dtype())), ", expected float32 or float16");
  const int64_t size = x.itemsize();
  if (x.strides(0) % size || x.strides(1) % size) fail(function, "x has strides that are not multiples of its item size");
  tersor::check_k(function, x.shape(1));
  const int64_t stride_k = x.shape(1) <= 1 ? 1 : x.strides(1) / size;
  return {x.shape(0), x.shape(1), {x.data(), is_f16(x) ? Dtype::f16 : Dtype::f32, x.strides(0) / size, stride_k}};
}

template <typename T>
const T* exact(const char* function, const char* name, const py::array& a, std::initializer_list<py::ssize_t> sizes) {
  if (!py::isinstance<py::array_t<T>>(a)) fail(function, name, " has dtype ", std::string(py::str(a.dtype())));
  bool same = a.ndim() == static_cast<py::ssize_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = a.shape(i) == sizes.begin()[i];
  if (!same || !(a.flags() & py::array::c_style)) fail(function, name, " has a wrong shape or is not C-contiguous");
  return static_cast<const T*>(a.data());
}

const uint8_t* tiles_of(const char* function, const py::array& weight_packed, int64_t N, int64_t K, int bits) {
  return exact<uint8_t>(function, "weight_packed", weight_packed,
                        {tersor::ceil_div(N, tersor::kTileN), tersor::ceil_div(K, tersor::tile_k(bits)), tersor::kTileBytes});
}

void add_bias(const char* function, const py::object& bias, const std::string& epilogue, tersor::LinearWeights* w) {
  if (!bias.is_none()) w->bias = exact<float>(function, "bias", py::cast<py::array>(bias), {w->N});
  w->bias_dtype = Dtype::f32;
  w->activation = tersor::activation_from(function, epilogue);
}

tersor::LinearWeights weights_of(const char* function, const py::array& weight_packed, const py::array& weight_scale,
                                 const py::object& bias, const std::string& epilogue, int64_t K, int64_t bits) {
  tersor::LinearWeights w{};
  if (weight_scale.ndim() != 1) fail(function, "weight_scale has ", weight_scale.ndim(), " dimensions, expected [N]");
  w.N = weight_scale.shape(0);
  w.K = K;
  w.bits = tersor::check_bits(function, bits);
  w.weight_scale = exact<float>(function, "weight_scale", weight_scale, {w.N});
  w.weight_packed = tiles_of(function, weight_packed, w.N, K, w.bits);
  add_bias(function, bias, epilogue, &w);
  return w;
}

py::tuple quantize(const char* name, const XRows& r, const float* absmax, const float* input_scale) {
  const auto& table = tersor::table_or_throw();
  py::array_t<int8_t> q({r.M, r.K});
  py::array_t<float> scale(r.M);
  py::array_t<int32_t> row_sum(r.M);
  int8_t* q_out = q.mutable_data();
  float* scale_out = scale.mutable_data();
  int32_t* sum_out = row_sum.mutable_data();
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    error = tersor::quantize_rows(table, r.M, r.K, r.rows, absmax, input_scale, q_out, scale_out, sum_out);
  }
  tersor::check_memory(name, error);
  return py::make_tuple(q, scale, row_sum);
}

py::tuple quantize_rows(const py::array& x, const py::object& absmax) {
  constexpr const char* kName = "quantize_rows";
  const XRows r = rows_of(kName, x);
  return quantize(kName, r, absmax.is_none() ? nullptr : exact<float>(kName, "absmax", py::cast<py::array>(absmax), {r.M}),
                  nullptr);
}

py::tuple quantize_static(const py::array& x, float input_scale) {
  return quantize("quantize_static", rows_of("quantize_static", x), nullptr, &input_scale);
}

py::tuple binarize_rows(const py::array& x, const py::array& threshold) {
  constexpr const char* kName = "binarize_rows";
  const auto& table = tersor::table_or_throw();
  const XRows r = rows_of(kName, x);
  const float* limits = exact<float>(kName, "threshold", threshold, {r.K});
  py::array_t<int32_t> bits({r.M, tersor::ceil_div(r.K, tersor::tile_k(1))});
  py::array_t<float> scale(r.M);
  auto* bits_out = reinterpret_cast<uint8_t*>(bits.mutable_data());
  float* scale_out = scale.mutable_data();
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    error = tersor::binarize_rows(table, r.M, r.K, r.rows, limits, bits_out, scale_out);
  }
  tersor::check_memory(kName, error);
  return py::make_tuple(bits, scale);
}

using LinearDriver = const char* (*)(const tersor::KernelTable&, int64_t, const tersor::StridedRows&, const tersor::LinearWeights&,
                                     const tersor::Output&);

// What is added to y [M][N]; null where it is None.
const void* residual_of(const char* function, const py::object& residual, const py::dtype& dtype, int64_t M, int64_t N) {
  if (residual.is_none()) return nullptr;
  const auto a = py::cast<py::array>(residual);
  if (!a.dtype().equal(dtype) || a.ndim() != 2 || a.shape(0) != M || a.shape(1) != N || !(a.flags() & py::array::c_style)) {
    fail(function, "residual is not C-contiguous ", std::string(py::str(dtype)), " [", M, ", ", N, "], as the result");
  }
  return a.data();
}

// `more(w)` sets what only some layers have.
template <typename More>
py::array float_linear(const char* name, LinearDriver driver, const py::array& x, const py::array& weight_packed,
                       const py::array& weight_scale, const py::object& bias, const std::string& epilogue, int64_t bits,
                       const py::object& residual, More more) {
  const auto& table = tersor::table_or_throw();
  const XRows r = rows_of(name, x);
  tersor::LinearWeights w = weights_of(name, weight_packed, weight_scale, bias, epilogue, r.K, bits);
  more(w);
  const int64_t width = w.glu ? w.N / 2 : w.N;
  py::array y(x.dtype(), std::vector<py::ssize_t>{r.M, width});
  const tersor::Output out{y.mutable_data(), r.rows.dtype, residual_of(name, residual, x.dtype(), r.M, width), width};
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    error = driver(table, r.M, r.rows, w, out);
  }
  tersor::check_memory(name, error);
  return y;
}

constexpr auto nothing_more = [](tersor::LinearWeights&) {};

py::array linear_dynamic(const py::array& x, const py::array& weight_packed, const py::array& weight_scale, const py::object& bias,
                         const std::string& epilogue, int64_t bits, const py::object& residual) {
  return float_linear("linear_dynamic", tersor::linear_dynamic, x, weight_packed, weight_scale, bias, epilogue, bits, residual,
                      nothing_more);
}

py::array linear_static(const py::array& x, const py::array& weight_packed, const py::array& weight_scale, const py::object& bias,
                        float input_scale, const std::string& epilogue, const py::object& residual) {
  return float_linear("linear_static", tersor::linear_dynamic, x, weight_packed, weight_scale, bias, epilogue, 8, residual,
                      [&](tersor::LinearWeights& w) { w.input_scale = &input_scale; });
}

py::array linear_grouped(const py::array& x, const py::array& weight_packed, const py::array& weight_scale,
                         const py::array& group_scale, const py::object& bias, const std::string& epilogue,
                         const py::object& residual) {
  constexpr const char* kName = "linear_grouped";
  return float_linear(kName, tersor::linear_dynamic, x, weight_packed, weight_scale, bias, epilogue, 4, residual,
                      [&](tersor::LinearWeights& w) {
                        const int64_t groups = group_scale.ndim() == 3 ? group_scale.shape(1) : 0;
                        w.group_size = tersor::check_groups(kName, w.K, groups);
                        w.group_scale = exact<uint8_t>(kName, "group_scale", group_scale,
                                                       {tersor::ceil_div(w.N, tersor::kTileN), groups, tersor::kGroupScaleBytes});
                      });
}

py::array linear_xnor(const py::array& x, const py::array& weight_packed, const py::array& weight_scale, const py::array& threshold,
                      const py::object& bias, const std::string& epilogue, const py::object& residual) {
  constexpr const char* kName = "linear_xnor";
  return float_linear(kName, tersor::linear_xnor, x, weight_packed, weight_scale, bias, epilogue, 1, residual,
                      [&](tersor::LinearWeights& w) { w.threshold = exact<float>(kName, "threshold", threshold, {w.K}); });
}

py::array linear_weight_only(const py::array& x, const py::array& weight_packed, const py::array& weight_scale,
                             const py::object& bias, const std::string& epilogue) {
  return float_linear("linear_weight_only", tersor::linear_weight_only, x, weight_packed, weight_scale, bias, epilogue, 8,
                      py::none(), nothing_more);
}

// Runs `driver` on x with what is sparse about `w` set.
py::array sparse_linear(const char* name, LinearDriver driver, const py::array& x, const XRows& r, tersor::LinearWeights w,
                        const py::object& bias, const std::string& epilogue) {
  const auto& table = tersor::table_or_throw();
  add_bias(name, bias, epilogue, &w);
  py::array y(x.dtype(), std::vector<py::ssize_t>{r.M, w.N});
  const tersor::Output out{y.mutable_data(), r.rows.dtype};
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    error = driver(table, r.M, r.rows, w, out);
  }
  tersor::check_memory(name, error);
  return y;
}

const uint8_t* bytes_of(const char* function, const char* name, const py::array& a) {
  if (!py::isinstance<py::array_t<uint8_t>>(a) || !(a.flags() & py::array::c_style)) {
    fail(function, name, " must be C-contiguous uint8");
  }
  return static_cast<const uint8_t*>(a.data());
}

py::array linear_sparse(const py::array& x, const py::array& weight_packed, const py::array& weight_index,
                        const py::array& weight_offset, const py::array& weight_sum, const py::array& weight_scale,
                        const py::object& bias, const std::string& epilogue) {
  constexpr const char* kName = "linear_sparse";
  const XRows r = rows_of(kName, x);
  tersor::LinearWeights w{};
  if (weight_scale.ndim() != 1) fail(kName, "weight_scale has ", weight_scale.ndim(), " dimensions, expected [N]");
  w.N = weight_scale.shape(0);
  w.K = r.K;
  w.weight_scale = exact<float>(kName, "weight_scale", weight_scale, {w.N});
  const auto sizes = [](const py::array& a) { return std::vector<int64_t>(a.shape(), a.shape() + a.ndim()); };
  const std::vector<int64_t> packed = sizes(weight_packed), index = sizes(weight_index);
  tersor::SparseWeights s =
      tersor::sparse_sizes(kName, {packed.data(), weight_packed.ndim()}, {index.data(), weight_index.ndim()}, w.N, w.K);
  const int64_t tiles = tersor::ceil_div(w.N, tersor::kTileN);
  s.packed = bytes_of(kName, "weight_packed", weight_packed);
  s.index = bytes_of(kName, "weight_index", weight_index);
  s.offset = exact<int64_t>(kName, "weight_offset", weight_offset, {tiles + 1});
  s.sum = exact<int32_t>(kName, "weight_sum", weight_sum, {tiles, tersor::kTileN});
  w.sparse = &s;
  return sparse_linear(kName, tersor::linear_dynamic, x, r, w, bias, epilogue);
}

py::array linear_sparse_float(const py::array& x, const py::array& weight_packed, const py::array& weight_index,
                              const py::array& weight_offset, const py::object& bias, const std::string& epilogue) {
  constexpr const char* kName = "linear_sparse_float";
  const XRows r = rows_of(kName, x);
  if (r.K > tersor::kMaxFloatK) fail(kName, "K=", r.K, " is above ", tersor::kMaxFloatK, ", what two bytes of index reach");
  if (weight_offset.ndim() != 1 || weight_offset.shape(0) < 1) fail(kName, "weight_offset is not [N + 1]");
  tersor::LinearWeights w{};
  w.N = weight_offset.shape(0) - 1;
  w.K = r.K;
  tersor::SparseFloatWeights s{};
  s.entries = weight_packed.ndim() == 2 ? weight_packed.shape(0) : 0;
  s.values = exact<uint8_t>(kName, "weight_packed", weight_packed, {s.entries, 4});
  s.index = exact<uint8_t>(kName, "weight_index", weight_index, {s.entries, 2});
  s.offset = exact<int64_t>(kName, "weight_offset", weight_offset, {w.N + 1});
  w.sparse_float = &s;
  return sparse_linear(kName, tersor::linear_weight_only, x, r, w, bias, epilogue);
}

tersor::S8Rows s8_rows(const char* function, const py::array& q, const py::array& row_sum, int64_t* M, int64_t* K) {
  if (!py::isinstance<py::array_t<int8_t>>(q) || q.ndim() != 2) fail(function, "q must be int8 [M, K]");
  if (q.shape(1) > 1 && q.strides(1) != 1) fail(function, "q must have contiguous rows");
  *M = q.shape(0);
  *K = q.shape(1);
  tersor::check_k(function, *K);
  return {static_cast<const int8_t*>(q.data()), q.strides(0), nullptr, exact<int32_t>(function, "row_sum", row_sum, {*M})};
}

py::array linear_acc(const py::array& q, const py::array& row_sum, const py::array& weight_packed, int64_t out_features,
                     int64_t bits) {
  constexpr const char* kName = "linear_acc";
  const auto& table = tersor::table_or_throw();
  int64_t M = 0, K = 0;
  const tersor::S8Rows rows = s8_rows(kName, q, row_sum, &M, &K);
  tersor::check_out_features(kName, out_features);
  tersor::LinearWeights w{};
  w.N = out_features;
  w.K = K;
  w.bits = tersor::check_bits(kName, bits);
  w.weight_packed = tiles_of(kName, weight_packed, w.N, K, w.bits);
  py::array_t<int32_t> acc({M, w.N});
  const tersor::Output out{acc.mutable_data(), Dtype::s32};
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    error = tersor::linear_s8(table, M, rows, w, out);
  }
  tersor::check_memory(kName, error);
  return acc;
}

py::array linear_s8(const py::array& q, const py::array& scale, const py::array& row_sum, const py::array& weight_packed,
                    const py::array& weight_scale, const py::object& bias, const std::string& epilogue, int64_t bits,
                    const py::object& residual) {
  constexpr const char* kName = "linear_s8";
  const auto& table = tersor::table_or_throw();
  int64_t M = 0, K = 0;
  tersor::S8Rows rows = s8_rows(kName, q, row_sum, &M, &K);
  rows.scale = exact<float>(kName, "scale", scale, {M});
  const tersor::LinearWeights w = weights_of(kName, weight_packed, weight_scale, bias, epilogue, K, bits);
  py::array_t<float> y({M, w.N});
  const tersor::Output out{y.mutable_data(), Dtype::f32, residual_of(kName, residual, y.dtype(), M, w.N), w.N};
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    error = tersor::linear_s8(table, M, rows, w, out);
  }
  tersor::check_memory(kName, error);
  return y;
}

tersor::LinearWeights gated(const char* function, tersor::LinearWeights w) {
  if (w.N % (2 * tersor::kTileN))
    fail(function, "weight_scale has ", w.N, " channels, expected a multiple of 32: gate and up in turn");
  w.glu = true;
  return w;
}

py::array linear_glu(const py::array& x, const py::array& weight_packed, const py::array& weight_scale, const py::object& bias,
                     const std::string& activation, int64_t bits) {
  constexpr const char* kName = "linear_glu";
  return float_linear(kName, tersor::linear_dynamic, x, weight_packed, weight_scale, bias, activation, bits, py::none(),
                      [](tersor::LinearWeights& w) { w = gated(kName, w); });
}

struct S8Result {
  py::array_t<int8_t> q;
  py::array_t<float> scale;
  py::array_t<int32_t> row_sum;
  S8Result(int64_t M, int64_t K) : q({M, K}), scale(M), row_sum(M) {}
  tersor::S8Output out() { return {q.mutable_data(), scale.mutable_data(), row_sum.mutable_data()}; }
};

py::tuple quantized(const char* name, const py::array& x, const py::array& weight_packed, const py::array& weight_scale,
                    const py::object& bias, const std::string& activation, int64_t bits, bool glu) {
  const auto& table = tersor::table_or_throw();
  const XRows r = rows_of(name, x);
  tersor::LinearWeights w = weights_of(name, weight_packed, weight_scale, bias, activation, r.K, bits);
  if (glu) w = gated(name, w);
  S8Result rows(r.M, glu ? w.N / 2 : w.N);
  const tersor::S8Output out = rows.out();
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    error = tersor::linear_quantize(table, r.M, r.rows, w, r.rows.dtype, out);
  }
  tersor::check_memory(name, error);
  return py::make_tuple(rows.q, rows.scale, rows.row_sum);
}

py::tuple linear_glu_quantize(const py::array& x, const py::array& weight_packed, const py::array& weight_scale,
                              const py::object& bias, const std::string& activation, int64_t bits) {
  return quantized("linear_glu_quantize", x, weight_packed, weight_scale, bias, activation, bits, true);
}

py::tuple linear_dynamic_quantize(const py::array& x, const py::array& weight_packed, const py::array& weight_scale,
                                  const py::object& bias, const std::string& epilogue, int64_t bits) {
  return quantized("linear_dynamic_quantize", x, weight_packed, weight_scale, bias, epilogue, bits, false);
}

// x and residual C-contiguous; (q, scale, row_sum, sum, y).
py::tuple norm_quantize(const py::array& x, const py::object& residual, const py::object& weight, const py::object& bias,
                        double eps, const std::string& kind) {
  constexpr const char* kName = "norm_quantize";
  const auto& table = tersor::table_or_throw();
  const XRows r = rows_of(kName, x);
  if (r.rows.stride_k != 1) fail(kName, "x has strided rows");
  tersor::Norm norm{};
  norm.K = r.K;
  norm.eps = static_cast<float>(eps);
  norm.rms = kind == "rms";
  if (!norm.rms && kind != "layer") fail(kName, "kind is '", kind, "', expected layer or rms");
  auto vector_of = [&](const char* name, const py::object& v) {
    return v.is_none() ? nullptr : exact<float>(kName, name, py::cast<py::array>(v), {r.K});
  };
  norm.weight = vector_of("weight", weight);
  norm.bias = vector_of("bias", bias);
  if (norm.rms && norm.bias) fail(kName, "bias is given, expected None for kind='rms'");
  const tersor::Rows added{residual_of(kName, residual, x.dtype(), r.M, r.K), r.rows.dtype, r.K};
  S8Result rows(r.M, r.K);
  const std::vector<py::ssize_t> sizes{r.M, r.K};
  py::array sum(x.dtype(), sizes), y(x.dtype(), sizes);
  const tersor::S8Output out = rows.out();
  void *sum_out = sum.mutable_data(), *y_out = y.mutable_data();
  const char* error = nullptr;
  {
    py::gil_scoped_release unlocked;
    error = tersor::norm_quantize(table, r.M, {r.rows.x, r.rows.dtype, r.rows.stride_m}, added, norm, out, sum_out, y_out);
  }
  tersor::check_memory(kName, error);
  return py::make_tuple(rows.q, rows.scale, rows.row_sum, sum, y);
}

// {"variants": [(name, runnable, missing)], "kernels": {entry: variant}, "error": ""} for this process.
py::dict cpu_info() {
  py::dict info;
  py::list rows;
  int count = 0;
  const tersor::Variant* all = tersor::variants(&count);
  for (int i = 0; i < count; ++i) rows.append(py::make_tuple(all[i].name, all[i].runnable, all[i].missing));
  info["variants"] = rows;
  py::dict served;
  if (const tersor::Kernels* k = tersor::kernels()) {
#define TERSOR_KERNEL_FIELD(type, name) served[#name] = k->name##_isa;
    TERSOR_KERNEL_ENTRIES(TERSOR_KERNEL_FIELD)
#undef TERSOR_KERNEL_FIELD
  }
  info["kernels"] = served;
  info["error"] = tersor::kernels_error();
  return info;
}

// (work, seconds) of a loop of limits.inl; `data` is what "read" reads.
py::tuple run_limit(const std::string& what, int64_t iterations, const py::array& data) {
  constexpr const char* kName = "run_limit";
  const auto& table = tersor::table_or_throw();
  const char* const names[] = {"int8", "f32", "popcount", "read"};
  const auto at = std::find(std::begin(names), std::end(names), what);
  if (at == std::end(names)) fail(kName, "what is '", what, "', expected int8, f32, popcount or read");
  if (!(data.flags() & py::array::c_style)) fail(kName, "data is not C-contiguous");
  const auto limit = static_cast<tersor::Limit>(at - std::begin(names));
  const void* bytes = data.data();
  const int64_t size = data.nbytes();
  int64_t work = 0;
  std::chrono::duration<double> taken{};
  {
    py::gil_scoped_release unlocked;
    const auto start = std::chrono::steady_clock::now();
    work = table.limits.run(limit, iterations, bytes, size);
    taken = std::chrono::steady_clock::now() - start;
  }
  return py::make_tuple(work, taken.count());
}

bool use_huge_pages(const py::array& buffer) {
  if (!(buffer.flags() & py::array::c_style)) fail("use_huge_pages", "buffer is not C-contiguous");
  return tersor::use_huge_pages(buffer.data(), buffer.nbytes());
}

py::tuple epilogues() {
  py::list names;
#define TERSOR_EPILOGUE_ROW(name) names.append(#name);
#include "../core/epilogue.inc"
#undef TERSOR_EPILOGUE_ROW
  return py::tuple(names);
}

}  // namespace

PYBIND11_MODULE(_numpy, m, py::mod_gil_not_used()) {
  m.attr("__version__") = TERSOR_VERSION;
  m.def("cpu_info", &cpu_info);
  m.def("epilogues", &epilogues);
  m.def("run_limit", &run_limit);
  m.def("use_huge_pages", &use_huge_pages);
  m.def("quantize_rows", &quantize_rows, py::arg("x"), py::arg("absmax") = py::none());
  m.def("quantize_static", &quantize_static);
  m.def("linear_dynamic", &linear_dynamic);
  m.def("linear_static", &linear_static);
  m.def("binarize_rows", &binarize_rows);
  m.def("linear_grouped", &linear_grouped);
  m.def("linear_xnor", &linear_xnor);
  m.def("linear_weight_only", &linear_weight_only);
  m.def("linear_sparse", &linear_sparse);
  m.def("linear_sparse_float", &linear_sparse_float);
  m.def("linear_acc", &linear_acc);
  m.def("linear_s8", &linear_s8);
  m.def("linear_glu", &linear_glu);
  m.def("linear_glu_quantize", &linear_glu_quantize);
  m.def("linear_dynamic_quantize", &linear_dynamic_quantize);
  m.def("norm_quantize", &norm_quantize);
}
