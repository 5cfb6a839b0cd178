#include "lightning/distributed/side_channel.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>

#include "lightning/errors.h"

namespace lightning {
namespace {

using std::chrono::milliseconds;

// LibTorch's errors are pages long.
template <class F>
auto in_store(F&& work) {
  try {
    return work();
  } catch (const c10::Error& error) {
    const std::string text = error.what_without_backtrace();
    throw std::runtime_error(str(
        "The meeting point of the run, which is kept by rank 0 or the launcher, does not answer: ",
        text.substr(0, text.find('\n')), ". The process that has it may have ended."));
  }
}

constexpr milliseconds kSoonest{1}, kLatest{50};  // between two looks

std::vector<uint8_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }

}  // namespace

SideChannel::SideChannel() = default;
SideChannel::SideChannel(const SideChannel&) = default;
SideChannel::SideChannel(SideChannel&&) noexcept = default;
SideChannel& SideChannel::operator=(const SideChannel&) = default;
SideChannel& SideChannel::operator=(SideChannel&&) noexcept = default;
SideChannel::~SideChannel() = default;

SideChannel::SideChannel(c10::intrusive_ptr<c10d::Store> store, int64_t rank, int64_t ranks)
    : store_(std::move(store)), rank_(rank), ranks_(ranks) {}

// The store's own waiting would have a limit of time.
void SideChannel::wait_for(const std::vector<std::string>& keys) {
  auto pause = kSoonest;
  while (!in_store([&] { return store_->check(keys); })) {
    std::this_thread::sleep_for(pause);
    pause = std::min(kLatest, 2 * pause);
  }
}

std::string SideChannel::take(const std::string& key) {
  const auto bytes = in_store([&] { return store_->get(key); });
  return {bytes.begin(), bytes.end()};
}

std::vector<std::string> SideChannel::gather(const std::string& name, const std::string& text) {
  if (store_ == nullptr) return {text};
  if (rank_ > 0) {
    in_store([&] { store_->set(str(name, "/", rank_), bytes_of(text)); });
    return {};
  }
  std::vector<std::string> keys, texts{text};
  for (int64_t rank = 1; rank < ranks_; ++rank) keys.push_back(str(name, "/", rank));
  wait_for(keys);
  for (const auto& key : keys) {
    texts.push_back(take(key));
    in_store([&] { return store_->deleteKey(key); });
  }
  return texts;
}

std::string SideChannel::broadcast(const std::string& name, const std::string& text) {
  if (store_ == nullptr) return text;
  const auto taking = name + "/taking", taken = name + "/taken";
  if (rank_ > 0) {
    wait_for({name});
    auto got = take(name);
    in_store([&] {
      if (store_->add(taking, 1) == ranks_ - 1) store_->set(taken, bytes_of("1"));
    });
    return got;
  }
  in_store([&] { store_->set(name, bytes_of(text)); });
  wait_for({taken});
  for (const auto& key : {name, taking, taken}) in_store([&] { return store_->deleteKey(key); });
  return text;
}

}  // namespace lightning
