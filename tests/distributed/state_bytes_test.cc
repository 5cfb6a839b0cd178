#include "lightning/distributed/state_bytes.h"

#include <ATen/Functions.h>

#include <catch2/catch.hpp>
#include <stdexcept>

using namespace lightning;

namespace {

State tree() {
  auto ordered = State::ordered_dict({{"weight", at::arange(6, at::kHalf).reshape({2, 3})}});
  auto dict = State::dict({{"none", State()},
                           {"yes", true},
                           {"no", false},
                           {"whole", int64_t{-7}},
                           {"fraction", 0.1},
                           {"text", std::string("zero \0 inside", 13)},
                           {"bytes", State::Bytes{"abc"}},
                           {"list", State::List{1, State::List{}, "x"}},
                           {"tuple", State::Tuple{{State(2)}}},
                           {"set", State::Set{{State(1), State(2)}}},
                           {"frozen", State::Set{{State("a")}, true}},
                           {"complex", std::complex<double>(1, -2)},
                           {"big", State::BigInt{std::string(9, '\1')}},
                           {"ordered", ordered},
                           {"empty tensor", at::empty({0, 3})},
                           {"scalar", at::scalar_tensor(2.5, at::kBFloat16)},
                           {"strided", at::arange(6).reshape({2, 3}).t()}});
  dict[int64_t{4}] = "key of a number";
  return dict;
}

}  // namespace

TEST_CASE("a state tree comes back from its bytes", "[distributed]") {
  const auto given = tree();
  const auto back = from_bytes(to_bytes(given));
  CHECK(back.repr() == given.repr());
  for (const char* name : {"empty tensor", "scalar", "strided"}) {
    CHECK(at::equal(back.at(name).as_tensor(), given.at(name).as_tensor()));
    CHECK(back.at(name).as_tensor().dtype() == given.at(name).as_tensor().dtype());
  }
  CHECK(at::equal(back.at("ordered").at("weight").as_tensor(),
                  given.at("ordered").at("weight").as_tensor()));
  CHECK(to_bytes(back) == to_bytes(given));
}

TEST_CASE("bytes that are cut short, or go on, are an error", "[distributed]") {
  const auto bytes = to_bytes(tree());
  for (size_t length = 0; length < bytes.size(); ++length) {
    CHECK_THROWS_AS(from_bytes(bytes.substr(0, length)), std::runtime_error);
  }
  CHECK_THROWS_AS(from_bytes(bytes + "n"), std::runtime_error);
}
