// Writing files so that what was written before survives a failure.
//
// Errors of all functions: std::runtime_error with the path and the system's reason.
#pragma once

#include <string>

namespace lightning {

// "~/x" and "$NAME/x" or "${NAME}/x" as the shell reads them; an unset name stays as it is.
std::string expand_path(const std::string& path);

// Whether something has this name, be it a link that leads nowhere.
bool path_exists(const std::string& path);
// Whether it is a folder, or a link to one.
bool folder_exists(const std::string& path);

// Creates the folder and those above it, where they are missing.
void make_directories(const std::string& path);

// The whole content. Errors also for a file that is not there.
std::string read_file(const std::string& path);

// Replaces the file at once: a reader, or a crash, sees the old content or the new one.
void write_file(const std::string& path, const std::string& text);

// Adds to the end, creating the file where it is missing. After an error the file is as it was.
void append_file(const std::string& path, const std::string& text);

// Writes to an open file at its end, whole or (after an error) not at all. `path` is for messages.
void append_all(int fd, const std::string& text, const std::string& path);

}  // namespace lightning
