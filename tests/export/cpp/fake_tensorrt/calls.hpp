// What the fake of TensorRT and CUDA has been called with.
#pragma once

#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace fake {

inline std::vector<std::string> calls;
inline int live = 0;             // objects and memory that have not been freed
inline bool fail_next = false;   // the next call that can fail does

inline bool fails() { return std::exchange(fail_next, false); }

// Record a call: its name, then its arguments with spaces between.
template <class... Arguments>
void record(const Arguments&... arguments) {
    std::ostringstream line;
    ((line << arguments << ' '), ...);
    std::string text = line.str();
    text.pop_back();
    calls.push_back(text);
}

// Counts an object from its construction to its destruction.
struct Counted {
    Counted() { ++live; }
    Counted(const Counted&) = delete;
    virtual ~Counted() { --live; }
};

}  // namespace fake
