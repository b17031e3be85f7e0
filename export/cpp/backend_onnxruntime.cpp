// Programs by ONNX Runtime on the CPU, through its C interface.
#include <list>

#include "backend.hpp"
#include "error.hpp"
#include "onnxruntime_table.hpp"

extern "C" const inferix::ort::Base* OrtGetApiBase();

namespace inferix {
namespace {

const ort::Functions& api() {
    static const ort::Functions made = [] {
        const void* table = OrtGetApiBase()->table(ort::version);
        if (table == nullptr) {
            throw std::runtime_error("ONNX Runtime " + std::string(OrtGetApiBase()->release()) +
                                     " is too old; expected 1.5 or later");
        }
        return ort::Functions(table);
    }();
    return made;
}

void check(ort::Status* status) {
    if (status == nullptr) return;
    std::string message = api().error_message(status);
    api().release_status(status);
    throw std::runtime_error("ONNX Runtime " + std::string(OrtGetApiBase()->release()) + ": " + message);
}

// A pointer of ONNX Runtime with the function that releases it.
template <class T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

ort::MemoryInfo* host_memory() {
    static ort::MemoryInfo* made = [] {
        ort::MemoryInfo* info = nullptr;
        check(api().create_cpu_memory(ort::arena, ort::default_memory, &info));
        return info;
    }();
    return made;
}

Owned<ort::Value> value_over(const void* elements_of, size_t bytes, const Shape& shape, int type) {
    ort::Value* value = nullptr;
    static double none;  // ONNX Runtime refuses a null pointer, also for an empty tensor
    void* data = elements_of == nullptr ? &none : const_cast<void*>(elements_of);
    check(api().create_tensor(host_memory(), data, bytes, shape.data(), shape.size(), type, &value));
    return {value, api().release_value.function};
}

// An input, and the elements that it has in place of float32.
struct Input {
    explicit Input(const View& view) {
        if (view.kind == Kind::integer) {
            integers = view.as<int64_t>();
            value = value_over(integers.data(), integers.size() * sizeof(int64_t), view.shape, ort::int64);
        } else if (view.kind == Kind::truth) {
            truths = view.as<uint8_t>();
            value = value_over(truths.data(), truths.size(), view.shape, ort::boolean);
        } else {
            value = value_over(view.data, elements(view.shape) * sizeof(float), view.shape, ort::float32);
        }
    }

    std::vector<int64_t> integers;
    std::vector<uint8_t> truths;
    Owned<ort::Value> value{nullptr, api().release_value.function};
};

Tensor tensor_of(ort::Value* value) {
    ort::Shape* made = nullptr;
    check(api().shape(value, &made));
    Owned<ort::Shape> owned(made, api().release_shape.function);
    size_t axes = 0;
    check(api().axis_count(made, &axes));
    Shape shape(axes);
    check(api().axes(made, shape.data(), axes));
    int type = ort::float32;
    check(api().element_type(made, &type));
    void* data = nullptr;
    check(api().tensor_data(value, &data));
    if (type == ort::boolean) {
        auto* truths = static_cast<const uint8_t*>(data);
        return Tensor(shape, std::vector<float>(truths, truths + elements(shape)), Kind::truth);
    }
    auto* floats = static_cast<const float*>(data);
    return Tensor(shape, std::vector<float>(floats, floats + elements(shape)));
}

class OnnxProgram final : public Program {
   public:
    OnnxProgram(ort::Env* env, const ort::SessionOptions* options, const ProgramEntry& entry) : entry_(entry) {
        ort::Session* session = nullptr;
        check(api().create_session(env, entry.path.c_str(), options, &session));
        session_.reset(session);
    }

    std::vector<Tensor> run(const std::vector<View>& inputs) override {
        std::list<Input> values;
        std::vector<const ort::Value*> given;
        std::vector<const char*> names, result_names;
        for (size_t index = 0; index < inputs.size(); ++index) {
            given.push_back(values.emplace_back(inputs[index]).value.get());
            names.push_back(entry_.inputs[index].c_str());
        }
        for (const std::string& name : entry_.outputs) result_names.push_back(name.c_str());
        std::vector<ort::Value*> results(result_names.size(), nullptr);
        check(api().run(session_.get(), nullptr, names.data(), given.data(), given.size(), result_names.data(),
                        result_names.size(), results.data()));
        std::vector<Tensor> made;
        for (ort::Value* result : results) {
            Owned<ort::Value> owned(result, api().release_value.function);
            made.push_back(tensor_of(result));
        }
        return made;
    }

   private:
    ProgramEntry entry_;
    Owned<ort::Session> session_{nullptr, api().release_session.function};
};

class OnnxRuntime final : public Backend {
   public:
    explicit OnnxRuntime(int threads) {
        ort::Env* env = nullptr;
        check(api().create_env(ort::log_errors, "inferix", &env));
        env_.reset(env);
        ort::SessionOptions* options = nullptr;
        check(api().create_session_options(&options));
        options_.reset(options);
        check(api().set_threads(options, threads));
        // Each program has threads of its own, which take the cores of others while they wait by spinning.
        check(api().add_session_config_entry(options, "session.intra_op.allow_spinning", "0"));
        // Without instructions for sums of 8-bit products, signed weights overflow in 16 bits; unsigned ones do not.
        check(api().add_session_config_entry(options, "session.x64quantprecision", "1"));
    }

    std::unique_ptr<Program> load(const ProgramEntry& entry) override {
        return std::make_unique<OnnxProgram>(env_.get(), options_.get(), entry);
    }

   private:
    Owned<ort::Env> env_{nullptr, api().release_env.function};
    Owned<ort::SessionOptions> options_{nullptr, api().release_session_options.function};
};

}  // namespace

std::unique_ptr<Backend> make_onnxruntime(int threads) { return std::make_unique<OnnxRuntime>(threads); }

}  // namespace inferix
