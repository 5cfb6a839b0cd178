#include "lightning/cuda/attention_backward.h"

// LIGHTNING_CUDNN is defined where the headers of cuDNN and of its frontend are installed.
#ifdef LIGHTNING_CUDNN
#include <ATen/Context.h>
#include <ATen/cudnn/Handle.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>

#define CUDNN_FRONTEND_SKIP_JSON_LIB  // it would bring a JSON library that is not ours
#include <cudnn_frontend.h>

#include <array>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>
#endif

namespace lightning::cuda {

#ifdef LIGHTNING_CUDNN
namespace {

namespace fe = cudnn_frontend;

// In the order of their ids in a graph.
std::array<const at::Tensor*, 9> tensors_of(const AttentionBackward& p) {
  return {&p.q, &p.k, &p.v, &p.output, &p.gradient, &p.logsumexp, &p.dq, &p.dk, &p.dv};
}

// Every kernel of cuDNN's can read 16 bytes at once at these addresses and strides.
bool is_readable(const at::Tensor& tensor) {
  if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 != 0) return false;
  if (tensor.stride(3) != 1) return false;
  for (int64_t dim = 0; dim < 3; ++dim) {
    const auto stride = tensor.stride(dim);
    if (tensor.size(dim) > 1 && (stride < tensor.size(3) || stride % 8 != 0)) return false;
  }
  return true;
}

bool can_run(const AttentionBackward& p) {
  const auto dtype = p.q.scalar_type();
  if (!p.q.is_cuda() || (dtype != at::kHalf && dtype != at::kBFloat16) || p.q.numel() == 0) {
    return false;
  }
  if (p.logsumexp.scalar_type() != at::kFloat || !p.logsumexp.is_contiguous()) return false;
  for (const auto* tensor : tensors_of(p)) {
    if (tensor == &p.logsumexp) continue;
    if (tensor->scalar_type() != dtype || !is_readable(*tensor)) return false;
  }
  return true;
}

fe::DataType_t type_of(const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) return fe::DataType_t::FLOAT;
  return tensor.scalar_type() == at::kHalf ? fe::DataType_t::HALF : fe::DataType_t::BFLOAT16;
}

// Null where cuDNN has no engine for it.
std::unique_ptr<fe::graph::Graph> planned(const AttentionBackward& p, cudnnHandle_t handle) {
  auto graph = std::make_unique<fe::graph::Graph>();
  graph->set_io_data_type(type_of(p.q))
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const auto tensors = tensors_of(p);
  std::array<std::shared_ptr<fe::graph::Tensor_attributes>, 6> in;
  for (size_t id = 0; id < in.size(); ++id) {
    in[id] = graph->tensor(fe::graph::Tensor_attributes()
                               .set_uid(static_cast<int64_t>(id))
                               .set_dim(tensors[id]->sizes().vec())
                               .set_stride(tensors[id]->strides().vec())
                               .set_data_type(type_of(*tensors[id])));
  }
  const auto scale = 1 / std::sqrt(static_cast<float>(p.q.size(3)));
  const auto out = graph->sdpa_backward(
      in[0], in[1], in[2], in[3], in[4], in[5],
      fe::graph::SDPA_backward_attributes()
          .set_name("attention_backward")
          .set_causal_mask(p.causal)
          .set_attn_scale(scale)
          .set_deterministic_algorithm(at::globalContext().deterministicAlgorithms()));
  for (size_t i = 0; i < out.size(); ++i) {
    const auto id = in.size() + i;
    out[i]
        ->set_output(true)
        .set_uid(static_cast<int64_t>(id))
        .set_dim(tensors[id]->sizes().vec())
        .set_stride(tensors[id]->strides().vec())
        .set_data_type(type_of(*tensors[id]));
  }
  // It may load kernels, which a graph that is being recorded would not survive.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  return graph->build(handle, {fe::HeurMode_t::A}).is_good() ? std::move(graph) : nullptr;
}

using Key = std::vector<int64_t>;

Key key_of(const AttentionBackward& p) {
  Key key{p.q.get_device(), static_cast<int64_t>(p.q.scalar_type()), p.causal,
          at::globalContext().deterministicAlgorithms()};
  for (const auto* tensor : tensors_of(p)) {
    key.insert(key.end(), tensor->sizes().begin(), tensor->sizes().end());
    key.insert(key.end(), tensor->strides().begin(), tensor->strides().end());
  }
  return key;
}

// Held while a plan is made, looked up or run: cuDNN does not promise that two threads may run one.
std::mutex mutex;

// Null where cuDNN has none. Never destroyed: a recorded graph runs a plan's kernels.
const fe::graph::Graph* plan_of(const AttentionBackward& p, cudnnHandle_t handle) {
  static auto& plans = *new std::map<Key, std::unique_ptr<fe::graph::Graph>>;
  const auto key = key_of(p);
  const std::lock_guard lock(mutex);
  const auto found = plans.find(key);
  if (found != plans.end()) return found->second.get();
  return plans.emplace(key, planned(p, handle)).first->second.get();
}

void launch(const AttentionBackward& p, const fe::graph::Graph& plan, cudnnHandle_t handle) {
  const auto workspace = at::empty({plan.get_workspace_size()}, p.q.options().dtype(at::kByte));
  std::unordered_map<int64_t, void*> addresses;
  for (const auto* tensor : tensors_of(p)) {
    addresses.emplace(static_cast<int64_t>(addresses.size()), tensor->data_ptr());
  }
  const std::lock_guard lock(mutex);
  auto status = plan.execute(handle, addresses, workspace.mutable_data_ptr());
  TORCH_CHECK(status.is_good(), "cuDNN, launching the backward of attention over q of ",
              p.q.sizes(), ", says: ", status.get_message(), ".");
}

}  // namespace

bool attention_backward(AttentionBackward p) {
  p.logsumexp = p.logsumexp.view({p.q.size(0), p.q.size(1), p.q.size(2), 1});
  if (!can_run(p)) return false;
  const c10::cuda::CUDAGuard device(p.q.get_device());
  const auto handle = at::native::getCudnnHandle();  // with the current stream
  const auto* const plan = plan_of(p, handle);
  if (plan == nullptr) return false;
  RECORD_FUNCTION("lightning::attention_backward", std::vector<c10::IValue>({p.q, p.k, p.v}));
  launch(p, *plan, handle);
  return true;
}

#else

bool attention_backward(AttentionBackward) { return false; }

#endif

}  // namespace lightning::cuda
