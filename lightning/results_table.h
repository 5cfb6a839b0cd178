// The table of metrics after validate() and test().
#pragma once

#include <map>
#include <string>
#include <vector>

namespace lightning {

//   results  metrics of each data loader, by name; "/dataloader_idx_1" at a name's end is left out
//   stage    "validate" or "test"
//   width    columns of the terminal; 0 or less stands for 120
// Ends with a line break; empty where nothing was logged. Many loaders take several tables.
// Source: Lightning 2.6, `_EvaluationLoop._print_results`.
std::string format_results_table(const std::vector<std::map<std::string, double>>& results,
                                 const std::string& stage, int width);

}  // namespace lightning
