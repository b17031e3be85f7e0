// The functions of ONNX Runtime's C interface that the runner calls, by their places in its table of functions.
//
// That table only grows at its end, so a place holds for every release since 1.5, and no header of ONNX Runtime is
// needed: its Python package has the library alone. Where CMake finds onnxruntime_c_api.h, the test
// onnxruntime_places compares all that is here with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace inferix::ort {

struct Status;
struct Env;
struct MemoryInfo;
struct Session;
struct SessionOptions;
struct RunOptions;
struct Value;
struct Shape;

// Numbers of its enumerations.
constexpr int log_errors = 3, arena = 1, default_memory = 0, float32 = 1, int64 = 7, boolean = 9;
constexpr uint32_t version = 5;  // of the table, all of whose places below exist since then

// The entry point of the library returns this.
struct Base {
    const void* (*table)(uint32_t version);
    const char* (*release)();
};

// A function at a place of the table.
template <size_t number, class Function>
struct At;

template <size_t number, class Result, class... Arguments>
struct At<number, Result(Arguments...)> {
    static constexpr size_t place = number;
    Result (*function)(Arguments...) = nullptr;

    explicit At(const void* table) {
        std::memcpy(&function, static_cast<const char*>(table) + place * sizeof(void*), sizeof function);
    }
    Result operator()(Arguments... arguments) const { return function(arguments...); }
};

struct Functions {
    explicit Functions(const void* t)
        : error_message(t), create_env(t), create_session(t), run(t), create_session_options(t), set_threads(t),
          create_tensor(t), tensor_data(t), element_type(t), axis_count(t), axes(t), shape(t), create_cpu_memory(t), release_env(t),
          release_status(t), release_session(t), release_value(t), release_shape(t), release_session_options(t),
          add_session_config_entry(t) {}

    At<2, const char*(const Status*)> error_message;
    At<3, Status*(int level, const char* name, Env**)> create_env;
    At<7, Status*(const Env*, const char* path, const SessionOptions*, Session**)> create_session;
    At<9, Status*(Session*, const RunOptions*, const char* const* inputs, const Value* const* values, size_t count,
                  const char* const* outputs, size_t output_count, Value** results)> run;
    At<10, Status*(SessionOptions**)> create_session_options;
    At<24, Status*(SessionOptions*, int threads)> set_threads;
    At<49, Status*(const MemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t axes, int type, Value**)>
        create_tensor;
    At<51, Status*(Value*, void** data)> tensor_data;
    At<60, Status*(const Shape*, int* type)> element_type;
    At<61, Status*(const Shape*, size_t*)> axis_count;
    At<62, Status*(const Shape*, int64_t* sizes, size_t count)> axes;
    At<65, Status*(const Value*, Shape**)> shape;
    At<69, Status*(int allocator, int memory, MemoryInfo**)> create_cpu_memory;
    At<92, void(Env*)> release_env;
    At<93, void(Status*)> release_status;
    At<95, void(Session*)> release_session;
    At<96, void(Value*)> release_value;
    At<99, void(Shape*)> release_shape;
    At<100, void(SessionOptions*)> release_session_options;
    At<130, Status*(SessionOptions*, const char* key, const char* value)> add_session_config_entry;
};

}  // namespace inferix::ort
