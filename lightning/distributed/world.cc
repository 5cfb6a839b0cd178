#include "lightning/distributed/world.h"

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <future>
#include <numeric>
#include <stdexcept>
#include <thread>

#include "lightning/distributed/collective_wait.h"
#include "lightning/distributed/environment_variable.h"
#include "lightning/distributed/join_notice.h"
#include "lightning/distributed/launcher.h"
#include "lightning/distributed/state_bytes.h"
#include "lightning/distributed/watch.h"
#include "lightning/errors.h"
#include "lightning/log.h"

namespace lightning {
namespace {

// Of reads of the store, once all are there.
constexpr std::chrono::minutes kStore(30);

// Of NCCL's end, which waits for that of the other ranks.
constexpr std::chrono::seconds kShutdown(20);

World* instance = nullptr;  // never deleted: what it holds is let go of by leave()

std::string first_line(const std::exception& error) {
  const auto* ours = dynamic_cast<const c10::Error*>(&error);
  const std::string text = ours != nullptr ? ours->what_without_backtrace() : error.what();
  return text.substr(0, text.find('\n'));
}

bool is_this_machine(const std::string& address) {
  return address == "127.0.0.1" || address == "localhost" || address == "::1";
}

std::vector<uint8_t> store_bytes(const std::string& text) { return {text.begin(), text.end()}; }

// One process of a node leaves room for the others.
void share_processors(int64_t processes) {
  if (processes == 1 || environment_variable("OMP_NUM_THREADS")) return;
  const auto processors = static_cast<int64_t>(std::thread::hardware_concurrency());
  at::set_num_threads(static_cast<int>(std::max<int64_t>(1, processors / processes)));
}

std::string choose_backend(const WorldOptions& options) {
  const auto backend =
      options.backend.empty() ? options.device.is_cuda() ? "nccl" : "gloo" : options.backend;
  if (backend != "gloo" && backend != "nccl") {
    throw MisconfigurationError(
        str("process_group_backend got \"", backend, "\", expected \"gloo\" or \"nccl\"."));
  }
  if (backend == "nccl" && !options.device.is_cuda()) {
    throw MisconfigurationError(
        "process_group_backend got \"nccl\" with processes on the CPU. Give \"gloo\", or leave it "
        "out.");
  }
#ifndef USE_C10D_NCCL
  if (backend == "nccl") {
    throw MisconfigurationError(
        "process_group_backend is \"nccl\", which this build of LibTorch does not have.");
  }
#endif
  return backend;
}

c10d::ReduceOp operation(ReduceOp op) {
  switch (op) {
    case ReduceOp::kMin:
      return c10d::ReduceOp::MIN;
    case ReduceOp::kMax:
      return c10d::ReduceOp::MAX;
    default:
      return c10d::ReduceOp::SUM;
  }
}

at::Tensor text_tensor(const std::string& text, int64_t size) {
  auto bytes = at::zeros({size}, at::kByte);
  if (!text.empty()) std::memcpy(bytes.data_ptr(), text.data(), text.size());
  return bytes;
}

std::string tensor_text(const at::Tensor& bytes, int64_t size) {
  return {static_cast<const char*>(bytes.const_data_ptr()), static_cast<size_t>(size)};
}

}  // namespace

// ---- Meeting ------------------------------------------------------------------------------------

World* World::current() { return instance; }

World::World(const WorldOptions& options)
    : options_(options), backend_(choose_backend(options)), process_(::getpid()) {}
World::~World() = default;

void World::check(const ProcessPlace& place) {
  if (instance == nullptr) return;
  const auto& before = instance->options_.place;
  if (place.world_size == before.world_size && place.global_rank == before.global_rank) return;
  throw MisconfigurationError(
      str("Trainer asks for ", place.world_size, " processes, but this program runs in ",
          before.world_size,
          " already, which its first run decided. Give all Trainers the same devices and "
          "num_nodes."));
}

World& World::join(const WorldOptions& options) {
  check(options.place);
  if (instance != nullptr) return *instance;
  auto* world = new World(options);
  const auto at_exit = [](int status, void* joining) {
    static_cast<World*>(joining)->leave(status);
  };
  ::on_exit(at_exit, world);
  share_processors(options.processes_per_node);
  world->main_address_ = options.environment->main_address();
  world->main_port_ = options.environment->main_port();
  {
    const JoinNotice notice([world] {
      const bool rank_0_says_it = world->global_rank() != 0 && Watch::current() != nullptr;
      return rank_0_says_it ? std::string() : world->joining();
    });
    world->meet();
    std::vector<int> everyone(static_cast<size_t>(options.place.world_size));
    std::iota(everyone.begin(), everyone.end(), 0);
    try {
      world->group_ = world->subgroup(everyone);
      world->store_->setTimeout(std::max<std::chrono::milliseconds>(kStore, options.timeout));
    } catch (const c10::DistStoreError& error) {
      throw std::runtime_error(str(world->joining(), " It waited in vain: ", first_line(error)));
    }
  }
  if (world->backend_ == "nccl") {
    // Opens the connections, and says early where there are none.
    world->reduce(at::ones({1}, options.device), ReduceOp::kSum).item();
  }
  // Once more: what was registered last runs first, and NCCL cannot be shut down after CUDA has
  // been.
  ::on_exit(at_exit, world);
  instance = world;
  info(str("Distributed: ", options.place.world_size, " processes on ", options.num_nodes,
           options.num_nodes == 1 ? " node, " : " nodes, ", world->backend_, "."));
  return *world;
}

std::string World::joining() const {
  const auto& place = options_.place;
  const auto& environment = *options_.environment;
  const auto* const watch = Watch::current();
  std::string there = "rank 0 has not answered yet";
  if (watch != nullptr) there = "rank 0 has answered, others have not";
  if (place.global_rank == 0) {
    there = str(watch == nullptr ? 1 : watch->joined(), " of ", place.world_size, " are there");
  }
  return str("Waiting for the other ranks of the run at ", main_address_, ":", main_port_.load(),
             " (MASTER_ADDR, MASTER_PORT): ", there, "; ", described_place(place, environment), ".",
             advice(place, environment));
}

void World::meet() {
  const auto& place = options_.place;
  const auto& environment = *options_.environment;
  const auto& address = main_address_;
  // torchrun has a store of its own at this port.
  const bool has_store = environment_variable("TORCHELASTIC_USE_AGENT_STORE") == "True";
  c10d::TCPStoreOptions store;
  store.isServer = place.global_rank == 0 && !has_store;
  store.port = static_cast<uint16_t>(main_port_);
  store.waitWorkers = false;
  store.timeout = join_timeout(options_.timeout);
  try {
    auto tcp = store.isServer || store.port != 0
                   ? c10::make_intrusive<c10d::TCPStore>(address, store)
                   : c10::intrusive_ptr<c10d::TCPStore>();
    if (tcp == nullptr) {
      throw std::runtime_error("MASTER_PORT is not set, and this process is not rank 0");
    }
    main_port_ = tcp->getPort();
    if (!environment.creates_processes_externally() && options_.processes_per_node > 1) {
      start_local_ranks({place, options_.processes_per_node, address, tcp->getPort()});
    }
    const auto attempt = environment_variable("TORCHELASTIC_RESTART_COUNT").value_or("0");
    store_ = c10::make_intrusive<c10d::PrefixStore>("lightning/" + attempt, tcp);
    if (place.global_rank == 0) {
      auto& watch = Watch::host(place, options_.num_nodes == 1 && is_this_machine(address));
      store_->set("watch", store_bytes(watch.meeting_point()));
    } else {
      const auto bytes = store_->get("watch");
      Watch::join(place, address, std::string(bytes.begin(), bytes.end()));
    }
  } catch (const std::exception& error) {
    throw std::runtime_error(
        str("Rank ", place.global_rank, " of ", place.world_size,
            store.isServer ? " cannot open" : " cannot reach", " the meeting point of the run at ",
            address, ":", store.port, " (MASTER_ADDR, MASTER_PORT): ", first_line(error), "; ",
            described_place(place, environment), ".", advice(place, environment)));
  }
  if (options_.num_nodes == 1) {
    address_ = "127.0.0.1";
  } else if (place.global_rank == 0) {
    address_ = Watch::current()->own_address();
    store_->set("address", store_bytes(address_));
  } else if (place.node_rank == 0) {  // reached rank 0 over an address of this host alone
    const auto bytes = store_->get("address");
    address_ = std::string(bytes.begin(), bytes.end());
  } else {
    address_ = Watch::current()->own_address();
  }
}

const c10::intrusive_ptr<c10d::ProcessGroup>& World::subgroup(const std::vector<int>& ranks) {
  auto& group = groups_[ranks];
  if (group == nullptr) group = make_group(ranks);
  return group;
}

c10::intrusive_ptr<c10d::ProcessGroup> World::make_group(const std::vector<int>& ranks) {
  using c10d::ProcessGroup;
  const auto name = str("lightning ", c10::ArrayRef<int>(ranks));
  const auto own = static_cast<int>(options_.place.global_rank);
  const auto rank = static_cast<int>(std::find(ranks.begin(), ranks.end(), own) - ranks.begin());
  const auto size = static_cast<int>(ranks.size());
  const auto below = [&](const char* part) {
    return c10::make_intrusive<c10d::PrefixStore>(name + "/" + part, store_);
  };
  auto group = c10::make_intrusive<ProcessGroup>(below("group"), rank, size);

  auto gloo = c10d::ProcessGroupGloo::Options::create(join_timeout(options_.timeout));
  // Two threads would write the name of the last collective at the same time (LibTorch 2.11), which
  // for one that is longer than a small string corrupts the heap.
  gloo->threads = 1;
  const auto interface = environment_variable("GLOO_SOCKET_IFNAME");
  gloo->devices.push_back(interface ? c10d::ProcessGroupGloo::createDeviceForInterface(*interface)
                                    : c10d::ProcessGroupGloo::createDeviceForHostname(address_));
  gloo->global_ranks_in_group.assign(ranks.begin(), ranks.end());
  const auto over_gloo =
      c10::make_intrusive<c10d::ProcessGroupGloo>(below("gloo"), rank, size, gloo);
  over_gloo->setTimeout(options_.timeout);
  group->setBackend(c10::kCPU, ProcessGroup::BackendType::GLOO, over_gloo);
  group->setDefaultBackend(ProcessGroup::BackendType::GLOO);
  if (options_.device.is_cuda() && backend_ == "gloo") {
    group->setBackend(c10::kCUDA, ProcessGroup::BackendType::GLOO, over_gloo);
  }
#ifdef USE_C10D_NCCL
  if (backend_ == "nccl") {
    auto nccl = c10d::ProcessGroupNCCL::Options::create();
    nccl->timeout = options_.timeout;
    nccl->global_ranks_in_group.assign(ranks.begin(), ranks.end());
    group->setBackend(c10::kCUDA, ProcessGroup::BackendType::NCCL,
                      c10::make_intrusive<c10d::ProcessGroupNCCL>(below("nccl"), rank, size, nccl));
    group->setDefaultBackend(ProcessGroup::BackendType::NCCL);
    group->setBoundDeviceId(options_.device);
  }
#endif
  group->setGroupName(name);
  return group;
}

SideChannel World::side_channel(const std::string& purpose) const {
  return SideChannel(c10::make_intrusive<c10d::PrefixStore>("side/" + purpose, store_->clone()),
                     global_rank(), world_size());
}

void World::leave(int status) {
  if (::getpid() != process_ || std::exchange(left_, true)) return;  // a fork of it ends
  bool is_down = true;
  // NCCL's end needs all ranks: rank 0 waits for the end of those that it started after it.
  const auto end_groups = [&] { is_down = status != 0 || shut_down(); };
  if (auto* watch = Watch::current()) {
    watch->leave(status, end_groups);
  } else {
    end_groups();
    kill_local_ranks();
  }
  if (status == 0) store_.reset();
  if (is_down) return;
  std::fflush(nullptr);
  ::_exit(status);  // a thread is still at it
}

// False where it takes too long.
bool World::shut_down() {
  auto done = std::make_shared<std::promise<void>>();
  auto is_done = done->get_future();
  std::thread shutdown([this, done] {
    group_.reset();
    for (const auto& [ranks, group] : groups_) {
      if (backend_ == "nccl") group->shutdown();
    }
    groups_.clear();
    done->set_value();
  });
  if (is_done.wait_for(kShutdown) == std::future_status::ready) {
    shutdown.join();
    return true;
  }
  shutdown.detach();
  warn(str("Rank ", global_rank(), " could not shut its process group down in ", kShutdown.count(),
           " s; the program ends without."));
  return false;
}

// ---- Collectives --------------------------------------------------------------------------------

void World::run_collective(const char* name,
                           const std::function<c10::intrusive_ptr<c10d::Work>()>& start) {
  wait_together(name, [&] { start()->wait(); });
}

// Means of whole numbers are cut, as the original's are. A copy, for the collective works in place.
at::Tensor World::reduce(const at::Tensor& tensor, ReduceOp op) {
  const at::NoGradGuard no_grad;
  const bool is_bool = tensor.scalar_type() == at::kBool;  // which no backend sums
  std::vector<at::Tensor> one{is_bool ? tensor.to(at::kInt)
                                      : tensor.detach().clone(at::MemoryFormat::Contiguous)};
  c10d::AllreduceOptions options;
  options.reduceOp = operation(op);
  run_collective("reduce", [&] { return group_->allreduce(one, options); });
  auto& sum = one[0];
  if (op == ReduceOp::kMean && at::isIntegralType(sum.scalar_type(), /*includeBool=*/false)) {
    sum.copy_(sum / world_size());
  } else if (op == ReduceOp::kMean) {
    sum.div_(world_size());
  }
  return is_bool ? sum.to(at::kBool) : sum;
}

at::Tensor World::all_gather(const at::Tensor& tensor) {
  const at::NoGradGuard no_grad;
  const bool is_bool = tensor.scalar_type() == at::kBool;
  std::vector<at::Tensor> input{(is_bool ? tensor.to(at::kByte) : tensor.detach()).contiguous()};
  std::vector<std::vector<at::Tensor>> outputs(1);
  for (int64_t rank = 0; rank < world_size(); ++rank) {
    outputs[0].push_back(at::empty_like(input[0]));
  }
  run_collective("all_gather", [&] { return group_->allgather(outputs, input); });
  const auto all = at::stack(outputs[0]);
  return is_bool ? all.to(at::kBool) : all;
}

at::Tensor World::all_gather_rows(const at::Tensor& tensor) {
  const at::NoGradGuard no_grad;
  State::List own;
  for (const auto size : tensor.sizes()) own.emplace_back(size);
  const auto shapes = all_gather_states(std::move(own));
  std::vector<int64_t> rows;
  std::vector<int64_t> widest{0};
  for (const auto& shape : shapes) {
    const auto& sizes = shape.as_list();
    rows.push_back(sizes.empty() ? 0 : sizes[0].as_int());
    if (rows.back() < widest[0]) continue;
    if (rows.back() == widest[0] && sizes.size() <= widest.size()) continue;
    widest.clear();
    for (const auto& size : sizes) widest.push_back(size.as_int());
  }
  auto padded = at::zeros(widest, tensor.options());
  if (tensor.numel() > 0) padded.narrow(0, 0, tensor.size(0)).copy_(tensor.detach());
  const auto all = all_gather(padded);
  std::vector<at::Tensor> parts;
  for (size_t rank = 0; rank < rows.size(); ++rank) {
    parts.push_back(all[static_cast<int64_t>(rank)].narrow(0, 0, rows[rank]));
  }
  return at::cat(parts);
}

State World::broadcast(State value, int64_t source_rank) {
  const auto text = global_rank() == source_rank ? to_bytes(value) : std::string();
  auto size = at::scalar_tensor(static_cast<int64_t>(text.size()), at::kLong);
  c10d::BroadcastOptions options;
  options.rootRank = source_rank;
  std::vector<at::Tensor> one{size};
  run_collective("broadcast", [&] { return group_->broadcast(one, options); });
  one[0] = text_tensor(text, size.item<int64_t>());
  run_collective("broadcast", [&] { return group_->broadcast(one, options); });
  if (global_rank() == source_rank) return value;
  return from_bytes(tensor_text(one[0], size.item<int64_t>()));
}

std::vector<State> World::all_gather_states(State value) {
  const auto text = to_bytes(value);
  const auto sizes = all_gather(at::scalar_tensor(static_cast<int64_t>(text.size()), at::kLong));
  const auto all = all_gather(text_tensor(text, sizes.max().item<int64_t>()));
  std::vector<State> values;
  for (int64_t rank = 0; rank < world_size(); ++rank) {
    values.push_back(from_bytes(tensor_text(all[rank], sizes[rank].item<int64_t>())));
  }
  return values;
}

void World::barrier(const std::string& name) {
  const Scope call = name.empty() ? nullptr : in_call(name);
  c10d::BarrierOptions options;
  options.device = c10::Device(c10::kCPU);
  run_collective("barrier", [&] { return group_->barrier(options); });
}

// The store's own waiting has a limit; it is repeated for as long as it takes. A rank that ends
// meanwhile ends all.
void World::wait_for_key(const std::string& key) {
  while (!store_->check({key})) {
    try {
      store_->wait({key}, std::chrono::minutes(10));
    } catch (const c10::DistStoreError&) {
      // Not yet; a store that is gone shows in check().
    }
  }
}

// Rank 0, in whose process the store may be, goes on when all others have heard.
void World::wait_for_all(const std::string& name) {
  const Scope call = in_call(name), waits = waiting_for("wait_for_all");
  const auto key = str("wait/", waits_++);
  if (store_->add(key, 1) == world_size()) store_->set(key + "/all", store_bytes(name));
  wait_for_key(key + "/all");
  if (global_rank() == 0) return wait_for_key(key + "/heard");
  if (store_->add(key + "/hearing", 1) == world_size() - 1) {
    store_->set(key + "/heard", store_bytes(name));
  }
}

bool World::reduce_any(bool value) {
  return reduce(at::scalar_tensor(value ? 1 : 0, at::kInt), ReduceOp::kMax).item<int>() == 1;
}

bool World::reduce_all(bool value) {
  return reduce(at::scalar_tensor(value ? 1 : 0, at::kInt), ReduceOp::kMin).item<int>() == 1;
}

}  // namespace lightning
