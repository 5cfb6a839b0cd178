#include "lightning/checkpoint/state.h"

#include <torch/types.h>

#include <catch2/catch.hpp>
#include <cmath>
#include <limits>

#include "lightning/errors.h"

using Catch::Matchers::Contains;
using namespace lightning;

namespace {

using How = State::Object::How;

State object(How how, const std::string& module, const std::string& name,
             State::List arguments = {}, State attributes = {}) {
  return State::Object{how, module, name, std::move(arguments), std::move(attributes), {}, {}};
}

// As numpy pickles it, for the dtype "f8" and the like.
State numpy_scalar(const std::string& type, std::string bytes, const std::string& order = "<") {
  const State dtype = object(How::kCall, "numpy", "dtype", {type, false, true},
                             State::Tuple{{3, order, {}, {}, {}, -1, -1, 0}});
  return object(How::kCall, "numpy._core.multiarray", "scalar",
                {dtype, State::Bytes{std::move(bytes)}});
}

template <class T>
std::string bytes_of(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof(value)};
}

State::Key other(const State& value) {
  return State::OtherKey{value.repr(), std::make_shared<const State>(value)};
}

std::vector<std::string> keys(const State& state) {
  std::vector<std::string> names;
  for (const auto& [key, value] : state.as_dict()) names.push_back(to_string(key));
  return names;
}

}  // namespace

TEST_CASE("a dict keeps the order of insertion and finds its keys, few or many",
          "[checkpoint][state]") {
  for (const int64_t count : {1, 7, 8, 9, 16, 17, 100, 5000}) {
    INFO(count);
    State state;
    for (int64_t i = 0; i < count; ++i) {
      state[str("k", i)] = i;
      state[i] = -i;
    }
    REQUIRE(state.as_dict().size() == static_cast<size_t>(2 * count));
    bool found = true;
    for (int64_t i = 0; i < count; ++i) {
      found &= state.at(str("k", i)).as_int() == i && state.at(i).as_int() == -i;
    }
    CHECK(found);
    CHECK_FALSE(state.contains("k"));
    CHECK_FALSE(state.contains(count));
    state["k0"] = "again";  // keeps its place
    CHECK(state.as_dict().begin()->second.as_string() == "again");
  }
}

TEST_CASE("an erased key is gone and the others stay, across the size where the index begins",
          "[checkpoint][state]") {
  State state;
  for (int64_t i = 0; i < 9; ++i) state[i] = i;
  state.as_dict().erase(int64_t{4});
  state.as_dict().erase("absent");
  state["new"] = 1;  // nine again
  state["last"] = 2;
  CHECK(keys(state) ==
        std::vector<std::string>{"0", "1", "2", "3", "5", "6", "7", "8", "new", "last"});
  CHECK(state.at("new").as_int() == 1);
  CHECK(state.at("last").as_int() == 2);
  CHECK_FALSE(state.contains(int64_t{4}));
  CHECK(state.at(int64_t{8}).as_int() == 8);
  const State copy = state;
  CHECK(copy.at("last").as_int() == 2);
}

TEST_CASE("bools, floats, None, tuples and large ints are keys", "[checkpoint][state]") {
  const State big = State::BigInt{std::string(9, '\x01')};
  State state;
  state[other(true)] = "bool";
  state[other(1.5)] = "float";
  state[other(State())] = "none";
  state[other(State::Tuple{{1, "a"}})] = "tuple";
  state[other(big)] = "big";
  state["True"] = "text";
  CHECK(keys(state) == std::vector<std::string>{"True", "1.5", "None", "(1, 'a')",
                                                "18519084246547628289", "True"});
  CHECK(state.at(other(true)).as_string() == "bool");
  CHECK(state.at("True").as_string() == "text");
  CHECK(state.at(other(State::Tuple{{1, "a"}})).as_string() == "tuple");
  CHECK_THROWS_WITH(state.at(other(false)), Contains("no key False"));
}

TEST_CASE("numpy's scalars are numbers", "[checkpoint][state]") {
  CHECK(numpy_scalar("f8", bytes_of(0.1)).as_double() == 0.1);
  CHECK(numpy_scalar("f4", bytes_of(0.5f)).as_double() == 0.5);
  CHECK(numpy_scalar("f2", bytes_of(uint16_t{0x3E00})).as_double() == 1.5);
  CHECK(numpy_scalar("i1", bytes_of(int8_t{-3})).as_int() == -3);
  CHECK(numpy_scalar("i2", bytes_of(int16_t{-300})).as_int() == -300);
  CHECK(numpy_scalar("i4", bytes_of(int32_t{-70000})).as_double() == -70000);
  CHECK(numpy_scalar("i8", bytes_of(int64_t{1} << 40)).as_int() == int64_t{1} << 40);
  CHECK(numpy_scalar("u8", bytes_of(~uint64_t{0})).as_double() == 18446744073709551615.0);
  CHECK_THROWS_WITH(numpy_scalar("u8", bytes_of(~uint64_t{0})).as_int(), Contains("an int"));
  CHECK(numpy_scalar("i4", std::string("\0\0\1\2", 4), ">").as_int() == 258);
  CHECK(numpy_scalar("b1", "\1").as_bool());
  CHECK(numpy_scalar("c8", bytes_of(1.0f) + bytes_of(-2.0f)).as_complex() ==
        std::complex<double>(1, -2));
  CHECK(numpy_scalar("f8", bytes_of(0.1)).repr() == "numpy.float64(0.1)");
  CHECK_THROWS_AS(numpy_scalar("f8", "short").as_double(), CheckpointError);
  CHECK_THROWS_AS(numpy_scalar("", "").as_double(), CheckpointError);
  CHECK_THROWS_AS(numpy_scalar("U1", "abcd").as_double(), CheckpointError);
  CHECK_THROWS_AS(numpy_scalar("f8", bytes_of(0.1)).as_int(), CheckpointError);
}

TEST_CASE("a reader that finds another type says both", "[checkpoint][state]") {
  CHECK_THROWS_WITH(State("a").as_int(), Contains("holds a str where an int was expected"));
  CHECK_THROWS_WITH(State(State::BigInt{"\1\1\1\1\1\1\1\1\1"}).as_int(),
                    Contains("holds a int where an int of 64 bits"));
  CHECK_THROWS_WITH(object(How::kGlobal, "torch", "float32").as_dict(),
                    Contains("holds a torch.float32 where a dict"));
  CHECK_THROWS_WITH(State::ordered_dict().as_list(), Contains("holds a OrderedDict where a list"));
  CHECK(State(State::BigInt{std::string("\0\0\0\0\0\0\0\0\x80", 9)}).as_double() ==
        -std::pow(2, 71));
}

TEST_CASE("a state shows itself as Python does", "[checkpoint][state]") {
  CHECK(State(State::List{1, -2.0, 1e-5, INFINITY, true, {}, "a'b", "\"'", "t\n\x7fß"}).repr() ==
        R"([1, -2.0, 1e-05, inf, True, None, "a'b", '"\'', 't\n\x7fß'])");
  CHECK(State(State::Tuple{}).repr() == "()");
  CHECK(State(State::Tuple{{1}}).repr() == "(1,)");
  CHECK(State(State::Set{{1, 2}, false}).repr() == "{1, 2}");
  CHECK(State(State::Set{{}, true}).repr() == "frozenset()");
  CHECK(State(State::Bytes{std::string("a\0'\xff", 4), false}).repr() == R"(b"a\x00'\xff")");
  CHECK(State(State::Bytes{"a", true}).repr() == "bytearray(b'a')");
  CHECK(State(std::complex<double>(1, -0.5)).repr() == "(1-0.5j)");
  CHECK(State(std::complex<double>(0, 2)).repr() == "2j");
  CHECK(State::ordered_dict().repr() == "OrderedDict()");
  CHECK(State::ordered_dict({{"a", 1}}).repr() == "OrderedDict([('a', 1)])");
  CHECK(State::dict({{"a", 1}, {int64_t{2}, State::dict()}}).repr() == "{'a': 1, 2: {}}");
  CHECK(State(torch::zeros({2, 3})).repr() == "Tensor float32 [2, 3]");
  CHECK(object(How::kCall, "torch", "Size", {State::Tuple{{2, 3}}}).repr() == "torch.Size([2, 3])");
  CHECK(object(How::kNew, "posix", "system", {"ls"}).repr() == "posix.system('ls')");
  CHECK(State(State::BigInt{std::string("\0\0\0\0\0\0\0\x80\xff", 9)}).repr() ==
        "-9223372036854775808");
}

TEST_CASE("a long state is cut where asked, between two characters", "[checkpoint][state]") {
  CHECK(State(State::List(1000, State(1))).repr(10) == "[1, 1, 1, ...");
  CHECK(State("ßßß").repr(4) == "'ß...");
  CHECK(State("abc").repr(5) == "'abc'");
  const State huge = State::BigInt{std::string(5000, '\1')};
  CHECK(huge.repr(20'000).substr(0, 8) == "0x101010");
}

TEST_CASE("a tensor that requires a gradient is kept detached, and that it did",
          "[checkpoint][state]") {
  const auto weight = torch::ones(2).requires_grad_();
  const State state = weight;
  CHECK(state.as_tensor_state().requires_grad);
  CHECK_FALSE(state.as_tensor().requires_grad());
  CHECK(state.as_tensor().data_ptr() == weight.data_ptr());
}
