#include "tools/program/program.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <sstream>

#include "lightning/errors.h"
#include "lightning/escaped.h"
#include "lightning/log.h"

namespace lightning::tools {
namespace {

// A word that is no subcommand where one is expected.
void check_subcommands(const CLI::App& app, const std::vector<std::string>& arguments) {
  const auto* at = &app;
  for (const auto& word : arguments) {
    const auto known = at->get_subcommands([](const CLI::App*) { return true; });
    if (known.empty()) return;
    if (!word.empty() && word[0] == '-') continue;
    const auto next = std::find_if(known.begin(), known.end(),
                                   [&](const CLI::App* one) { return one->check_name(word); });
    if (next == known.end()) {
      std::vector<std::string> names;
      for (const auto* one : known) names.push_back(one->get_name());
      throw MisconfigurationError(str("\"", word, "\" is no command of `", at->get_name(),
                                      "`. Known: ", join(names), ".", did_you_mean(word, names)));
    }
    at = *next;
  }
}

// The lines of the library, which may hold text from a file, without harm.
class EscapedLog {
 public:
  explicit EscapedLog(std::ostream& err)
      : before_(set_log_sink([&err](const std::string& line) { err << escaped(line) << '\n'; })) {}
  ~EscapedLog() { set_log_sink(before_); }
  EscapedLog(const EscapedLog&) = delete;
  EscapedLog& operator=(const EscapedLog&) = delete;

 private:
  LogSink before_;
};

}  // namespace

std::string message_of(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return escaped(torch_error != nullptr ? torch_error->what_without_backtrace() : error.what());
}

int run_program(CLI::App& app, const std::vector<std::string>& arguments,
                const std::function<int()>& work, std::ostream& out, std::ostream& err) {
  const EscapedLog log(err);
  try {
    check_subcommands(app, arguments);
    auto reversed = arguments;  // as CLI11 takes them
    std::reverse(reversed.begin(), reversed.end());
    app.parse(reversed);
  } catch (const CLI::ParseError& error) {
    std::ostringstream text;
    const int status = app.exit(error, text, text);
    (status == 0 ? out : err) << (status == 0 ? "" : "error: ") << text.str();
    return status == 0 ? 0 : kMisused;
  } catch (const MisconfigurationError& error) {
    err << "error: " << message_of(error) << '\n';
    return kMisused;
  }
  try {
    return work();
  } catch (const MisconfigurationError& error) {
    err << "error: " << message_of(error) << '\n';
    return kMisused;
  } catch (const std::exception& error) {
    err << "error: " << message_of(error) << '\n';
    return kBroken;
  }
}

}  // namespace lightning::tools
