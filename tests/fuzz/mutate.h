// Makes broken files out of whole ones: some by changing bytes wherever they lie, others by
// changing the parts of a format so that the rest still fits, which leads past the first checks.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/fuzz/input.h"
#include "tests/fuzz/random.h"

namespace lightning::fuzz {

// A zip without compression as torch.save writes it, CRCs included.
//
//   records   names without the folder, and contents
std::string make_zip(const std::vector<std::pair<std::string, std::string>>& records);

class Mutator {
 public:
  explicit Mutator(std::vector<Input> seeds) : seeds_(std::move(seeds)) {}

  const std::vector<Input>& seeds() const { return seeds_; }

  // The same number gives the same mutant, as long as the seeds are the same.
  Input make(uint64_t number) const;
  std::string mutate(Format format, std::string bytes, Random& random) const;
  // Knows no format.
  std::string mutate_bytes(std::string bytes, Random& random) const;

 private:
  using Zip = std::vector<std::pair<std::string, std::string>>;

  void change_bytes(std::string& bytes, Random& random) const;
  std::string mutate_pickle(std::string bytes, Random& random) const;
  void change_pickle(std::string& bytes, Random& random) const;
  std::string mutate_zip(std::string bytes, Random& random) const;
  void change_records(Zip& records, Random& random) const;
  std::string mutate_safetensors(std::string bytes, Random& random) const;

  std::vector<Input> seeds_;
};

}  // namespace lightning::fuzz
