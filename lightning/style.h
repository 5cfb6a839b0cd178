// Colours and weights of text on a terminal, written as rich writes them: "bold magenta",
// "#6206E0", "dim underline", "white on grey23", "rgb(98,6,224)", "color(54)".
// Source: rich 15, `Style.parse`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace lightning {

// How many colours a terminal has; kNone writes plain text, without escape sequences.
enum class ColorSystem { kNone, kStandard, kEightBit, kTruecolor };

// What the environment says of its terminal: NO_COLOR, COLORTERM, TERM.
ColorSystem terminal_colors();

struct Color {
  // One of a terminal's 256, else red, green and blue.
  std::optional<uint8_t> number;
  uint8_t red = 0, green = 0, blue = 0;
};

// Between `from` (0) and `to` (1).
Color blend(const Color& from, const Color& to, double share);

class Style {
 public:
  Style() = default;  // plain
  // Errors: MisconfigurationError with the word that is no colour or attribute. `where` names the
  // option.
  static Style parse(const std::string& definition, const std::string& where);
  static Style of(const Color& color);

  // The text between escape sequences that set and reset the style. Colours that a terminal lacks
  // become the nearest it has.
  std::string paint(const std::string& text, ColorSystem colors) const;

  const std::optional<Color>& color() const { return color_; }

 private:
  std::string codes(ColorSystem colors) const;

  std::string attributes_;  // SGR numbers, "1;3"
  std::optional<Color> color_;
  std::optional<Color> background_;
};

}  // namespace lightning
