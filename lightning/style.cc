#include "lightning/style.h"

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <sstream>
#include <vector>

#include "lightning/errors.h"

namespace lightning {
namespace {

constexpr uint8_t kSteps[] = {0, 95, 135, 175, 215, 255};  // of the 6 x 6 x 6 cube

Color numbered(int number) {
  Color color;
  color.number = static_cast<uint8_t>(number);
  return color;
}

const std::map<std::string, const char*>& attributes() {
  static const std::map<std::string, const char*> table = {
      {"bold", "1"},    {"b", "1"},           {"dim", "2"},      {"italic", "3"},
      {"i", "3"},       {"underline", "4"},   {"u", "4"},        {"blink", "5"},
      {"reverse", "7"}, {"r", "7"},           {"conceal", "8"},  {"strike", "9"},
      {"s", "9"},       {"underline2", "21"}, {"overline", "53"}};
  return table;
}

const std::map<std::string, int>& color_names() {
  static const std::map<std::string, int> table = [] {
    std::map<std::string, int> names;
    const char* const basic[] = {"black", "red",     "green", "yellow",
                                 "blue",  "magenta", "cyan",  "white"};
    for (int i = 0; i < 8; ++i) {
      names[basic[i]] = i;
      names[std::string("bright_") + basic[i]] = 8 + i;
    }
    names["grey0"] = names["gray0"] = 16;
    names["grey100"] = names["gray100"] = 231;
    const int shades[] = {3,  7,  11, 15, 19, 23, 27, 30, 35, 39, 42, 46,
                          50, 54, 58, 62, 66, 70, 74, 78, 82, 85, 89, 93};
    for (int i = 0; i < 24; ++i) {
      names["grey" + std::to_string(shades[i])] = names["gray" + std::to_string(shades[i])] =
          232 + i;
    }
    return names;
  }();
  return table;
}

bool parse_color(const std::string& word, Color& color) {
  unsigned r = 0, g = 0, b = 0;
  int end = 0;
  const auto whole = [&] { return end == static_cast<int>(word.size()); };
  if ((std::sscanf(word.c_str(), "#%2x%2x%2x%n", &r, &g, &b, &end) == 3 && whole() && end == 7) ||
      (std::sscanf(word.c_str(), "rgb(%u,%u,%u)%n", &r, &g, &b, &end) == 3 && whole() && r < 256 &&
       g < 256 && b < 256)) {
    color = {std::nullopt, static_cast<uint8_t>(r), static_cast<uint8_t>(g),
             static_cast<uint8_t>(b)};
    return true;
  }
  if (std::sscanf(word.c_str(), "color(%u)%n", &r, &end) == 1 && whole() && r < 256) {
    color = numbered(static_cast<int>(r));
    return true;
  }
  const auto named = color_names().find(word);
  if (named == color_names().end()) return false;
  color = numbered(named->second);
  return true;
}

// Red, green and blue of one of the 256, as terminals show them by default.
Color resolved(const Color& color) {
  if (!color.number) return color;
  const int n = *color.number;
  if (n < 16) {
    const uint8_t level = n == 7 ? 192 : n < 8 ? 128 : 255;
    if (n == 8) return {std::nullopt, 128, 128, 128};
    const auto part = [&](int bit) { return static_cast<uint8_t>((n & bit) != 0 ? level : 0); };
    return {std::nullopt, part(1), part(2), part(4)};
  }
  if (n >= 232) {
    const auto grey = static_cast<uint8_t>(8 + 10 * (n - 232));
    return {std::nullopt, grey, grey, grey};
  }
  return {std::nullopt, kSteps[(n - 16) / 36], kSteps[(n - 16) / 6 % 6], kSteps[(n - 16) % 6]};
}

int nearest(const Color& color, int first, int last) {
  int best = first;
  int least = 1 << 30;
  for (int n = first; n <= last; ++n) {
    const Color at = resolved(numbered(n));
    const int r = at.red - color.red, g = at.green - color.green, b = at.blue - color.blue;
    const int distance = 3 * r * r + 4 * g * g + 2 * b * b;  // as eyes weigh them, roughly
    if (distance < least) {
      least = distance;
      best = n;
    }
  }
  return best;
}

// The SGR numbers that set a colour; `base` is 30 for text, 40 for its background.
std::string color_codes(const Color& color, int base, ColorSystem colors) {
  if (!color.number && colors == ColorSystem::kTruecolor) {
    return str(base + 8, ";2;", int{color.red}, ";", int{color.green}, ";", int{color.blue});
  }
  int number = color.number ? *color.number : nearest(color, 16, 255);
  if (colors == ColorSystem::kStandard && number >= 16) {
    number = nearest(resolved(color.number ? color : numbered(number)), 0, 15);
  }
  if (number < 8) return std::to_string(base + number);
  if (number < 16) return std::to_string(base + 60 + number - 8);
  return str(base + 8, ";5;", number);
}

}  // namespace

ColorSystem terminal_colors() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  if (!variable("NO_COLOR").empty()) return ColorSystem::kNone;
  const std::string depth = variable("COLORTERM");
  if (depth == "truecolor" || depth == "24bit") return ColorSystem::kTruecolor;
  const std::string kind = variable("TERM");
  if (kind == "dumb" || kind == "unknown") return ColorSystem::kNone;
  if (kind.find("256color") != std::string::npos) return ColorSystem::kEightBit;
  return ColorSystem::kStandard;
}

Color blend(const Color& from, const Color& to, double share) {
  const Color a = resolved(from), b = resolved(to);
  const auto mix = [share](uint8_t x, uint8_t y) {
    return static_cast<uint8_t>(x + (y - x) * share);
  };
  return {std::nullopt, mix(a.red, b.red), mix(a.green, b.green), mix(a.blue, b.blue)};
}

Style Style::of(const Color& color) {
  Style style;
  style.color_ = color;
  return style;
}

Style Style::parse(const std::string& definition, const std::string& where) {
  Style style;
  std::istringstream words(definition);
  bool background = false;
  for (std::string word; words >> word;) {
    std::transform(word.begin(), word.end(), word.begin(),
                   [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
    if (word == "none" || word == "default") continue;
    if (word == "on") {
      background = true;
      continue;
    }
    const auto attribute = attributes().find(word);
    Color color;
    if (attribute != attributes().end()) {
      style.attributes_ += (style.attributes_.empty() ? "" : ";") + std::string(attribute->second);
    } else if (parse_color(word, color)) {
      (background ? style.background_ : style.color_) = color;
      background = false;
    } else {
      std::vector<std::string> known;
      for (const auto& entry : attributes()) known.push_back(entry.first);
      for (const auto& entry : color_names()) known.push_back(entry.first);
      throw MisconfigurationError(
          str(where, " got the style \"", definition, "\", in which \"", word,
              "\" is neither a colour nor an attribute.", did_you_mean(word, known),
              " Write words such as bold, dim, italic, underline, magenta, grey54, #6206E0, "
              "\"on\" before a background."));
    }
  }
  return style;
}

std::string Style::codes(ColorSystem colors) const {
  std::vector<std::string> parts;
  if (!attributes_.empty()) parts.push_back(attributes_);
  if (color_) parts.push_back(color_codes(*color_, 30, colors));
  if (background_) parts.push_back(color_codes(*background_, 40, colors));
  return join(parts, ";");
}

std::string Style::paint(const std::string& text, ColorSystem colors) const {
  if (colors == ColorSystem::kNone || text.empty()) return text;
  const std::string numbers = codes(colors);
  return numbers.empty() ? text : "\x1b[" + numbers + "m" + text + "\x1b[0m";
}

}  // namespace lightning
