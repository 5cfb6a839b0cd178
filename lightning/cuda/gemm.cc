#include "lightning/cuda/gemm.h"

#include <atomic>
#include <cstdlib>
#include <string>

#include "lightning/errors.h"
#include "lightning/param/replay.h"
#include "lightning/param/touch.h"

// LIGHTNING_CUBLASLT is defined where LibTorch is a build with CUDA.
#if defined(LIGHTNING_CUBLASLT) && __has_include(<cublasLt.h>)
#define LIGHTNING_HAS_CUBLASLT 1
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContextLight.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/record_function.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#endif

namespace lightning::cuda {
namespace {

GemmMode mode_from_environment() {
  const char* const given = std::getenv("LIGHTNING_GEMM");
  const std::string name = given != nullptr ? given : "heuristic";
  if (name == "measured") return GemmMode::kMeasured;
  if (name == "heuristic") return GemmMode::kHeuristic;
  if (name == "off") return GemmMode::kOff;
  throw MisconfigurationError(str("The environment has LIGHTNING_GEMM=\"", name,
                                  "\", expected measured, heuristic or off."));
}

std::atomic<GemmMode>& mode() {
  static std::atomic<GemmMode> value = mode_from_environment();
  return value;
}

}  // namespace

GemmMode gemm_mode() { return mode(); }

void set_gemm_mode(GemmMode to) { mode() = to; }

void choose_gemm_mode(bool benchmark) {
  if (std::getenv("LIGHTNING_GEMM") != nullptr) return;
  set_gemm_mode(benchmark ? GemmMode::kMeasured : GemmMode::kHeuristic);
}

size_t cheapest_gemm(const std::vector<float>& costs) {
  constexpr float kClearly = 0.99f;
  size_t best = 0;
  for (size_t i = 1; i < costs.size(); ++i) {
    if (costs[i] < costs[best] && costs[i] < kClearly * costs[0]) best = i;
  }
  return best;
}

#ifdef LIGHTNING_HAS_CUBLASLT
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;
constexpr int kProposals = 24;
constexpr int kTimedRounds = 9;      // after two for all candidates
constexpr float kWorthMore = 1.12f;  // of the least cost: what costs more has lost by then
constexpr size_t kMostTimed = 12;    // as have all but so many

// Tiles of Hopper's algorithm. Those with variants of the kernel are tried, for cuBLASLt itself
// proposes them seldom: of 3,300 configurations of each product of GPT-2 and of a GPT of 1.3 B
// these were the fastest, by 1 to 7 % on an H200, as their sizes, no powers of two, fill its
// multiprocessors to the last wave.
constexpr uint32_t kHopperAlgorithm = 66;
struct Tile {
  uint32_t id;
  float rows, columns;
  std::array<uint32_t, 2> variants{};
  bool is_tried() const { return variants[1] != 0; }
};
constexpr Tile kTiles[] = {{CUBLASLT_MATMUL_TILE_64x256, 64, 256},
                           {CUBLASLT_MATMUL_TILE_96x128, 96, 128},
                           {CUBLASLT_MATMUL_TILE_96x192, 96, 192, {0, 2}},
                           {CUBLASLT_MATMUL_TILE_128x96, 128, 96},
                           {CUBLASLT_MATMUL_TILE_128x128, 128, 128, {1, 3}},
                           {CUBLASLT_MATMUL_TILE_128x136, 128, 136, {1, 3}},
                           {CUBLASLT_MATMUL_TILE_128x144, 128, 144, {1, 3}},
                           {CUBLASLT_MATMUL_TILE_128x152, 128, 152, {1, 3}},
                           {CUBLASLT_MATMUL_TILE_128x160, 128, 160, {1, 3}},
                           {CUBLASLT_MATMUL_TILE_128x168, 128, 168, {1, 3}},
                           {CUBLASLT_MATMUL_TILE_128x192, 128, 192},
                           {CUBLASLT_MATMUL_TILE_128x256, 128, 256, {4, 6}},
                           {CUBLASLT_MATMUL_TILE_144x128, 144, 128, {4, 6}},
                           {CUBLASLT_MATMUL_TILE_192x96, 192, 96, {1, 3}},
                           {CUBLASLT_MATMUL_TILE_192x112, 192, 112, {1, 3}},
                           {CUBLASLT_MATMUL_TILE_192x128, 192, 128},
                           {CUBLASLT_MATMUL_TILE_192x192, 192, 192, {4, 6}},
                           {CUBLASLT_MATMUL_TILE_256x64, 256, 64},
                           {CUBLASLT_MATMUL_TILE_256x96, 256, 96},
                           {CUBLASLT_MATMUL_TILE_256x128, 256, 128, {5, 7}},
                           {CUBLASLT_MATMUL_TILE_256x144, 256, 144, {5, 7}},
                           {CUBLASLT_MATMUL_TILE_256x160, 256, 160, {5, 7}},
                           {CUBLASLT_MATMUL_TILE_256x168, 256, 168, {5, 7}}};

// What a tile's time is multiplied by. Training holds a card at the limit of its power, where a
// product lasts the longer the more energy it takes, and a product that is timed for a moment does
// not. Most of what tells tiles apart there is what they fetch: 1 / rows + 1 / columns operands for
// each multiplication. Run for 0.2 s without a pause, tiles of 256 x 128 to 256 x 168 took 4 to 6 %
// less of the time of a moment than those of 128 x 128 to 128 x 168 (H200, products of a Llama of
// 1.2 B; 2 % for GPT-2's). GPT-2's step is the shortest with this number, 0.6 % shorter than
// without; twice as large, it gives half of that back.
float energy_of(const Tile& tile) { return 1 + 12 * (1 / tile.rows + 1 / tile.columns); }

constexpr uint16_t kClusters[] = {CUBLASLT_CLUSTER_SHAPE_2x1x1, CUBLASLT_CLUSTER_SHAPE_1x2x1};

void check(cublasStatus_t status, const char* doing) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "cuBLASLt, ", doing,
              ", says: ", cublasLtGetStatusString(status), ".");
}

// ---- What cuBLASLt can read ---------------------------------------------------------------------

// A matrix whose rows, or, transposed, columns are contiguous.
struct Layout {
  int64_t stride = 0;
  bool transposed = false;
};

// At these addresses and strides every kernel can read 16 bytes at once.
bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

bool fits(int64_t stride, int64_t contiguous) { return stride % 8 == 0 && stride >= contiguous; }

std::optional<Layout> layout_of(const at::Tensor& matrix) {
  if (!is_aligned(matrix.const_data_ptr())) return std::nullopt;
  if (matrix.stride(1) == 1 && fits(matrix.stride(0), matrix.size(1))) {
    return Layout{matrix.stride(0), false};
  }
  if (matrix.stride(0) == 1 && fits(matrix.stride(1), matrix.size(0))) {
    return Layout{matrix.stride(1), true};
  }
  return std::nullopt;
}

bool has_rows(const at::Tensor& matrix) {
  return is_aligned(matrix.const_data_ptr()) && matrix.stride(1) == 1 &&
         fits(matrix.stride(0), matrix.size(1));
}

bool is_matrix(const at::Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns;
}

bool is_32_bit(int64_t size) { return size > 0 && size <= std::numeric_limits<int32_t>::max(); }

bool have_shapes(const Gemm& g) {
  if (g.a.dim() != 2 || g.b.dim() != 2 || g.a.size(1) != g.b.size(0)) return false;
  const auto m = g.a.size(0), n = g.b.size(1);
  return is_32_bit(m) && is_32_bit(n) && is_32_bit(g.a.size(1)) && is_matrix(g.out, m, n) &&
         (!g.bias.defined() || (g.bias.dim() == 1 && g.bias.size(0) == n)) &&
         (!g.aux.defined() || is_matrix(g.aux, m, n));
}

bool have_types(const Gemm& g) {
  const auto dtype = g.a.scalar_type();
  if (!at::isReducedFloatingType(dtype)) return false;
  const auto is_like_a = [&](const at::Tensor& tensor) {
    return !tensor.defined() || (tensor.scalar_type() == dtype && tensor.device() == g.a.device());
  };
  const bool same = g.out.scalar_type() == dtype;
  if (!same && g.out.scalar_type() != at::kFloat) return false;
  if (g.out.device() != g.a.device()) return false;
  return is_like_a(g.b) && is_like_a(g.bias) && is_like_a(g.aux);
}

bool can_fuse(const Gemm& g) {
  if (g.aux.defined() && !((g.gelu || g.gelu_gradient) && has_rows(g.aux))) return false;
  if (g.gelu_gradient && (!g.aux.defined() || g.gelu || g.bias.defined())) return false;
  if (g.bias.defined() &&
      !(is_aligned(g.bias.const_data_ptr()) && (g.bias.stride(0) == 1 || g.bias.size(0) == 1))) {
    return false;
  }
  const bool fused = g.gelu || g.gelu_gradient || g.bias.defined();
  if (g.factor.defined() &&
      (fused || g.accumulate || g.factor.numel() != 1 || g.factor.scalar_type() != at::kFloat ||
       g.factor.device() != g.a.device())) {
    return false;
  }
  return !fused || (!g.accumulate && g.out.scalar_type() == g.a.scalar_type());
}

// ---- One problem in cuBLASLt's words ------------------------------------------------------------

using Algorithms = std::vector<cublasLtMatmulHeuristicResult_t>;

// All that the choice of an algorithm depends on.
using Key = std::array<int64_t, 18>;

// cuBLASLt knows columns: a matrix of ours is its transpose to it, so out^T = b^T a^T is what it
// computes, with b as its first factor, and a bias over our rows is what it calls one.
class Problem {
 public:
  explicit Problem(const Gemm& g)
      : accumulate_(g.accumulate),
        first_(g.b.const_data_ptr()),
        second_(g.a.const_data_ptr()),
        out_(g.out.mutable_data_ptr()) {
    const auto m = g.a.size(0), k = g.a.size(1), n = g.b.size(1);
    const auto b = layout_of(g.b).value(), a = layout_of(g.a).value();
    const auto type = type_of(g.a), out_type = type_of(g.out);
    const int64_t epilogue = epilogue_of(g);
    check(cublasLtMatmulDescInit(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "a new product");
    set<cublasOperation_t>(CUBLASLT_MATMUL_DESC_TRANSA, b.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set<cublasOperation_t>(CUBLASLT_MATMUL_DESC_TRANSB, a.transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set<uint32_t>(CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<uint32_t>(epilogue));
    if (g.factor.defined()) {
      set<int32_t>(CUBLASLT_MATMUL_DESC_POINTER_MODE, CUBLASLT_POINTER_MODE_DEVICE);
      factor_and_zero_ = at::constant_pad_nd(g.factor.reshape({1}), {0, 1});
    }
    const void* bias = nullptr;
    void* aux = nullptr;
    int64_t aux_stride = 0;
    if (g.bias.defined()) {
      bias = g.bias.const_data_ptr();
      set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
    }
    if (g.aux.defined()) {
      aux = g.aux.mutable_data_ptr();
      aux_stride = g.aux.stride(0);
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, aux_stride);
    }
    lay_out(first_layout_, type, n, k, b);
    lay_out(second_layout_, type, k, m, a);
    lay_out(out_layout_, out_type, n, m, {g.out.stride(0), false});
    key_ = {g.a.get_device(),
            m,
            n,
            k,
            a.stride,
            b.stride,
            a.transposed,
            b.transposed,
            g.out.stride(0),
            type,
            out_type,
            epilogue,
            aux_stride,
            g.accumulate,
            g.factor.defined(),
            alignment(first_) << 16 | alignment(second_),
            alignment(out_),
            alignment(bias) << 16 | alignment(aux)};
    is_16_bit_ = out_type != CUDA_R_32F;
  }

  const Key& key() const { return key_; }

  // The algorithms that cuBLASLt proposes, its guess of the best first.
  Algorithms proposals(cublasLtHandle_t handle) {
    cublasLtMatmulPreferenceOpaque_t preference;
    check(cublasLtMatmulPreferenceInit(&preference), "new preferences");
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      check(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)),
            "setting a preference");
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{kWorkspaceBytes});
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(first_));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(second_));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(out_));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(out_));
    // Parts of a sum are never rounded to 16 bits.
    if (is_16_bit_) {
      prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
             uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    }
    Algorithms results(kProposals);
    int found = 0;
    const auto status = cublasLtMatmulAlgoGetHeuristic(
        handle, &operation_, &first_layout_, &second_layout_, &out_layout_, &out_layout_,
        &preference, kProposals, results.data(), &found);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) check(status, "looking for an algorithm");
    results.resize(status == CUBLAS_STATUS_SUCCESS ? found : 0);
    const auto is_unusable = [](const auto& one) { return one.state != CUBLAS_STATUS_SUCCESS; };
    results.erase(std::remove_if(results.begin(), results.end(), is_unusable), results.end());
    return results;
  }

  // The proposals, and with them what cuBLASLt can do beyond, where that is known to be worth a
  // try.
  Algorithms candidates(cublasLtHandle_t handle, Algorithms proposals) {
    const auto base = std::find_if(proposals.begin(), proposals.end(), [](const auto& one) {
      return get<uint32_t>(one.algo, CUBLASLT_ALGO_CONFIG_ID) == kHopperAlgorithm;
    });
    if (base == proposals.end()) return proposals;
    auto algorithm = base->algo;
    set(algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM, int32_t{1});
    set(algorithm, CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME, uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE});
    for (const auto& tile : kTiles) {
      if (!tile.is_tried()) continue;
      set(algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID, tile.id);
      for (const auto variant : tile.variants) {
        set(algorithm, CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION, variant);
        for (const auto cluster : kClusters) {
          set(algorithm, CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID, cluster);
          if (const auto checked = can_do(handle, algorithm)) proposals.push_back(*checked);
        }
      }
    }
    return proposals;
  }

  // energy_of() its tile; of one that is unknown, as of the commonest.
  static float energy_of(const cublasLtMatmulHeuristicResult_t& one) {
    constexpr Tile kCommon{CUBLASLT_MATMUL_TILE_128x128, 128, 128};
    const auto id = get<uint32_t>(one.algo, CUBLASLT_ALGO_CONFIG_TILE_ID);
    const auto* const found = std::find_if(std::begin(kTiles), std::end(kTiles),
                                           [&](const Tile& tile) { return tile.id == id; });
    return lightning::cuda::energy_of(found != std::end(kTiles) ? *found : kCommon);
  }

  // `into` is where the result goes; what it is added to is always `out`.
  cublasStatus_t launch(cublasLtHandle_t handle, const cublasLtMatmulHeuristicResult_t& choice,
                        const at::Tensor& workspace, void* into, cudaStream_t stream) {
    const float host[] = {1, accumulate_ ? 1.0f : 0.0f};
    const float* const scalars =
        factor_and_zero_.defined() ? factor_and_zero_.const_data_ptr<float>() : host;
    return cublasLtMatmul(
        handle, &operation_, &scalars[0], first_, &first_layout_, second_, &second_layout_,
        &scalars[1], accumulate_ ? out_ : into, &out_layout_, into, &out_layout_, &choice.algo,
        workspace.defined() ? workspace.mutable_data_ptr() : nullptr, choice.workspaceSize, stream);
  }

  void* out() const { return out_; }

 private:
  static cudaDataType_t type_of(const at::Tensor& tensor) {
    if (tensor.scalar_type() == at::kFloat) return CUDA_R_32F;
    return tensor.scalar_type() == at::kHalf ? CUDA_R_16F : CUDA_R_16BF;
  }

  static int64_t epilogue_of(const Gemm& g) {
    if (g.gelu_gradient) return CUBLASLT_EPILOGUE_DGELU;
    if (g.gelu && g.aux.defined()) {
      return g.bias.defined() ? CUBLASLT_EPILOGUE_GELU_AUX_BIAS : CUBLASLT_EPILOGUE_GELU_AUX;
    }
    if (g.gelu) return g.bias.defined() ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU;
    return g.bias.defined() ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT;
  }

  // Two classes alone, so that a problem is not measured anew for each address.
  static uint32_t alignment(const void* data) {
    return reinterpret_cast<uintptr_t>(data) % 256 == 0 ? 256 : 16;
  }

  template <class T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    check(cublasLtMatmulDescSetAttribute(&operation_, attribute, &value, sizeof(value)),
          "describing a product");
  }

  template <class T>
  static T get(const cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t of) {
    T value{};
    size_t written = 0;
    check(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, of, &value, sizeof(value), &written),
          "reading an algorithm");
    return value;
  }

  template <class T>
  static void set(cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t of,
                  const T& value) {
    check(cublasLtMatmulAlgoConfigSetAttribute(&algorithm, of, &value, sizeof(value)),
          "describing an algorithm");
  }

  std::optional<cublasLtMatmulHeuristicResult_t> can_do(cublasLtHandle_t handle,
                                                        const cublasLtMatmulAlgo_t& algorithm) {
    cublasLtMatmulHeuristicResult_t result{};
    const auto status =
        cublasLtMatmulAlgoCheck(handle, &operation_, &first_layout_, &second_layout_, &out_layout_,
                                &out_layout_, &algorithm, &result);
    if (status != CUBLAS_STATUS_SUCCESS || result.workspaceSize > kWorkspaceBytes) return {};
    result.algo = algorithm;
    return result;
  }

  // [rows, columns] in cuBLASLt's order, before it is transposed or not.
  static void lay_out(cublasLtMatrixLayoutOpaque_t& to, cudaDataType_t type, int64_t rows,
                      int64_t columns, const Layout& layout) {
    if (layout.transposed) std::swap(rows, columns);
    check(cublasLtMatrixLayoutInit(&to, type, rows, columns, layout.stride), "describing a matrix");
  }

  bool accumulate_, is_16_bit_ = true;
  const void *first_, *second_;
  void* out_;
  at::Tensor factor_and_zero_;
  cublasLtMatmulDescOpaque_t operation_;
  cublasLtMatrixLayoutOpaque_t first_layout_, second_layout_, out_layout_;
  Key key_{};
};

// ---- The choice ---------------------------------------------------------------------------------

// Thread-safe, one for each device; never destroyed, as the driver may be gone by then.
cublasLtHandle_t handle_of(c10::DeviceIndex device) {
  static std::mutex mutex;
  static auto& handles = *new std::map<c10::DeviceIndex, cublasLtHandle_t>;
  const std::lock_guard lock(mutex);
  auto& handle = handles[device];
  if (handle == nullptr) {
    // It may allocate, which a graph that is being recorded would not survive.
    const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
    check(cublasLtCreate(&handle), "starting");
  }
  return handle;
}

at::Tensor workspace_of(size_t bytes, const at::Tensor& like) {
  if (bytes == 0) return {};
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte));
}

class Event {
 public:
  Event() { C10_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { C10_CUDA_CHECK_WARN(cudaEventDestroy(event_)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;

  void record(cudaStream_t stream) { C10_CUDA_CHECK(cudaEventRecord(event_, stream)); }
  // Not through LibTorch, whose sync_debug_mode would refuse it: it waits once for each problem.
  void wait() { C10_CUDA_CHECK(cudaEventSynchronize(event_)); }
  float since(const Event& before) const {
    float result = 0;
    C10_CUDA_CHECK(cudaEventElapsedTime(&result, before.event_, event_));
    return result;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// Of costs taken once, the largest that is worth taking again.
float highest_to_time(std::vector<float> costs) {
  std::sort(costs.begin(), costs.end());
  return std::min(kWorthMore * costs.front(), costs[std::min(costs.size(), kMostTimed) - 1]);
}

// Each one's time, the middle of several, by its energy; infinity for one that fails. They take
// turns, so that a clock that falls as the device warms favours none; and the middle, for a
// smallest time would be that of a moment at which it had not fallen yet.
std::vector<float> measured(Problem& problem, const Algorithms& candidates, const Gemm& g,
                            cublasLtHandle_t handle, cudaStream_t stream) {
  constexpr float kFailed = std::numeric_limits<float>::infinity();
  size_t bytes = 0;
  for (const auto& one : candidates) bytes = std::max(bytes, one.workspaceSize);
  const auto workspace = workspace_of(bytes, g.out);
  const auto scratch =
      g.accumulate ? at::empty_strided(g.out.sizes(), g.out.strides(), g.out.options()) : g.out;
  void* const into = scratch.mutable_data_ptr();
  std::vector<float> costs(candidates.size(), 0);
  const auto fail = [&](size_t i) { costs[i] = kFailed; };
  const auto cost = [&](size_t i, float ms) { return ms * Problem::energy_of(candidates[i]); };
  // The times of one turn of all that are still there.
  const auto round = [&] {
    std::vector<Event> events(candidates.size() + 1);
    for (size_t i = 0; i < candidates.size(); ++i) {
      events[i].record(stream);
      if (costs[i] == kFailed) continue;
      const auto status = problem.launch(handle, candidates[i], workspace, into, stream);
      if (status != CUBLAS_STATUS_SUCCESS) fail(i);
    }
    events.back().record(stream);
    return events;
  };
  round();
  auto first = round();
  first.back().wait();
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (costs[i] != kFailed) costs[i] = cost(i, first[i + 1].since(first[i]));
  }
  const float highest = highest_to_time(costs);
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (costs[i] > highest) fail(i);
  }
  std::vector<std::vector<Event>> events;
  for (int turn = 0; turn < kTimedRounds; ++turn) events.push_back(round());
  events.back().back().wait();
  for (size_t i = 0; i < candidates.size(); ++i) {
    if (costs[i] == kFailed) continue;
    std::vector<float> each;
    for (const auto& one : events) each.push_back(one[i + 1].since(one[i]));
    std::nth_element(each.begin(), each.begin() + kTimedRounds / 2, each.end());
    costs[i] = cost(i, each[kTimedRounds / 2]);
  }
  return costs;
}

// What is known of a problem; no `first` where cuBLASLt has no algorithm.
struct Known {
  std::optional<cublasLtMatmulHeuristicResult_t> first, fastest;
};

std::mutex table_mutex;

std::map<Key, Known>& table() {
  static auto& result = *new std::map<Key, Known>;
  return result;
}

std::optional<Known> find(const Key& key) {
  const std::lock_guard lock(table_mutex);
  const auto found = table().find(key);
  return found == table().end() ? std::nullopt : std::make_optional(found->second);
}

// Of two threads that met a problem at once, the first to finish decides.
Known keep(const Key& key, const Known& known) {
  const std::lock_guard lock(table_mutex);
  auto& entry = table()[key];
  if (!entry.first) entry.first = known.first;
  if (!entry.fastest) entry.fastest = known.fastest;
  return entry;
}

bool is_recording(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

std::optional<cublasLtMatmulHeuristicResult_t> choice_of(Problem& problem, const Gemm& g,
                                                         cublasLtHandle_t handle,
                                                         cudaStream_t stream) {
  const bool first_only =
      gemm_mode() == GemmMode::kHeuristic || at::globalContext().deterministicAlgorithms();
  auto known = find(problem.key());
  if (!known || (known->first && !known->fastest && !first_only && !is_recording(stream))) {
    // Without the lock: waiting for the device may take another thread's work.
    const auto proposals = problem.proposals(handle);
    Known now;
    if (!proposals.empty()) now.first = proposals[0];
    if (!proposals.empty() && !first_only && !is_recording(stream)) {
      const auto candidates = problem.candidates(handle, proposals);
      now.fastest = candidates[cheapest_gemm(measured(problem, candidates, g, handle, stream))];
    }
    known = keep(problem.key(), now);
  }
  return first_only || !known->fastest ? known->first : known->fastest;
}

}  // namespace

bool can_use(const Gemm& g) {
  if (!g.a.defined() || !g.b.defined() || !g.out.defined() || !g.a.is_cuda()) return false;
  for (const auto* operand : {&g.a, &g.b, &g.bias}) whole(*operand);  // it is read by its address
  return gemm_mode() != GemmMode::kOff && have_shapes(g) && have_types(g) && layout_of(g.a) &&
         layout_of(g.b) && has_rows(g.out) && can_fuse(g) &&
         at::cuda::getDeviceProperties(g.a.get_device())->major >= 8;
}

namespace {

// Of one that can be used.
bool launch(const Gemm& g) {
  const c10::cuda::CUDAGuard guard_of_device(g.out.get_device());
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  const auto handle = handle_of(g.out.get_device());
  Problem problem(g);
  const auto choice = choice_of(problem, g, handle, stream);
  if (!choice) return false;
  RECORD_FUNCTION("lightning::gemm", std::vector<c10::IValue>({g.a, g.b}));
  const auto workspace = workspace_of(choice->workspaceSize, g.out);
  check(problem.launch(handle, *choice, workspace, problem.out(), stream), "launching a product");
  return true;
}

bool has_algorithm(const Gemm& g) {
  const c10::cuda::CUDAGuard guard_of_device(g.out.get_device());
  Problem problem(g);
  return choice_of(problem, g, handle_of(g.out.get_device()),
                   c10::cuda::getCurrentCUDAStream().stream())
      .has_value();
}

// For a region, which runs it again in backward: of tensors that are made anew then.
void launch_replayable(const Gemm& g) {
  Gemm bare = g;
  for (auto* const tensor : {&bare.a, &bare.b, &bare.out, &bare.bias, &bare.aux, &bare.factor}) {
    tensor->reset();
  }
  replayable({g.a, g.b, g.bias, g.factor}, {g.out, g.aux},
             [bare](const std::vector<at::Tensor>& in, const std::vector<at::Tensor>& out) {
               Gemm again = bare;
               again.a = in[0];
               again.b = in[1];
               again.bias = in[2];
               again.factor = in[3];
               again.out = out[0];
               again.aux = out[1];
               TORCH_CHECK(launch(again), "cuBLASLt has lost an algorithm since forward.");
             });
}

}  // namespace

bool gemm(const Gemm& g) {
  if (!can_use(g)) return false;
  // What precedes the GELU is read by its gradient, which backward takes.
  if (!recording_region() || g.gelu_gradient) return launch(g);
  if (!has_algorithm(g)) return false;
  launch_replayable(g);
  return true;
}

std::vector<float> gemm_costs(const Gemm& g) {
  if (!can_use(g)) return {};
  const c10::cuda::CUDAGuard guard_of_device(g.out.get_device());
  const auto stream = c10::cuda::getCurrentCUDAStream().stream();
  const auto handle = handle_of(g.out.get_device());
  Problem problem(g);
  const auto candidates = problem.candidates(handle, problem.proposals(handle));
  return candidates.empty() ? std::vector<float>()
                            : measured(problem, candidates, g, handle, stream);
}

#else

bool can_use(const Gemm&) { return false; }

bool gemm(const Gemm&) { return false; }

std::vector<float> gemm_costs(const Gemm&) { return {}; }

#endif

}  // namespace lightning::cuda
