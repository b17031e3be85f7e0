// Errors of the runner, with what a user can do about them.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace inferix {

// A bad argument or a damaged engine: exit code 2 of the command.
struct UsageError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// A value for a message, in quotes and cut to 200 bytes.
inline std::string in_quotes(const std::string& value) {
    return value.size() <= 200 ? "'" + value + "'" : "'" + value.substr(0, 200) + "...'";
}

// A message as one line, since those of runtimes may have several.
inline std::string one_line(const std::string& message) {
    std::istringstream lines(message);
    std::string made;
    for (std::string line; std::getline(lines, line);)
        if (size_t begin = line.find_first_not_of(" \t\r"); begin != line.npos) {
            if (!made.empty()) made += ' ';
            made.append(line, begin);
        }
    return made;
}

}  // namespace inferix
