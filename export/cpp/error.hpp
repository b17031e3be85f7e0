// Errors of the runner, with what a user can do about them.
#pragma once

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

}  // namespace inferix
