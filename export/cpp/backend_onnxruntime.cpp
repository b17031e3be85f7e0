// Programs by ONNX Runtime on the CPU, through its C API.
#include <onnxruntime_c_api.h>

#include "backend.hpp"
#include "error.hpp"

namespace inferix {
namespace {

const OrtApi& api() {
    static const OrtApi* made = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (made == nullptr)
        throw std::runtime_error(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                                 " is older than the headers of this build; install version 1." +
                                 std::to_string(ORT_API_VERSION) + " or later");
    return *made;
}

void check(OrtStatus* status) {
    if (status == nullptr) return;
    std::string message = api().GetErrorMessage(status);
    api().ReleaseStatus(status);
    throw std::runtime_error("ONNX Runtime: " + message);
}

// A pointer of ONNX Runtime with the function that releases it.
template <class T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

OrtMemoryInfo& host_memory() {
    static OrtMemoryInfo* made = [] {
        OrtMemoryInfo* info = nullptr;
        check(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &info));
        return info;
    }();
    return *made;
}

Owned<OrtValue> value_of(const View& view) {
    OrtValue* value = nullptr;
    static float none;  // ONNX Runtime refuses a null pointer, also for an empty tensor
    void* data = view.data == nullptr ? &none : const_cast<float*>(view.data);
    check(api().CreateTensorWithDataAsOrtValue(&host_memory(), data, elements(view.shape) * sizeof(float),
                                               view.shape.data(), view.shape.size(),
                                               ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &value));
    return {value, [](OrtValue* owned) { api().ReleaseValue(owned); }};
}

Tensor tensor_of(OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api().GetTensorTypeAndShape(value, &info));
    Owned<OrtTensorTypeAndShapeInfo> owned(info, [](auto* i) { api().ReleaseTensorTypeAndShapeInfo(i); });
    size_t axes = 0;
    check(api().GetDimensionsCount(info, &axes));
    Shape shape(axes);
    check(api().GetDimensions(info, shape.data(), axes));
    void* data = nullptr;
    check(api().GetTensorMutableData(value, &data));
    auto* floats = static_cast<const float*>(data);
    return Tensor(shape, std::vector<float>(floats, floats + elements(shape)));
}

class OnnxProgram final : public Program {
   public:
    OnnxProgram(OrtEnv* env, const OrtSessionOptions* options, const ProgramEntry& entry) : entry_(entry) {
        OrtSession* session = nullptr;
        check(api().CreateSession(env, entry.path.c_str(), options, &session));
        session_.reset(session);
    }

    std::vector<Tensor> run(const std::vector<View>& inputs) override {
        std::vector<Owned<OrtValue>> values;
        std::vector<const OrtValue*> given;
        std::vector<const char*> names, result_names;
        for (size_t index = 0; index < inputs.size(); ++index) {
            values.push_back(value_of(inputs[index]));
            given.push_back(values.back().get());
            names.push_back(entry_.inputs[index].c_str());
        }
        for (const std::string& name : entry_.outputs) result_names.push_back(name.c_str());
        std::vector<OrtValue*> results(result_names.size(), nullptr);
        check(api().Run(session_.get(), nullptr, names.data(), given.data(), given.size(), result_names.data(),
                        result_names.size(), results.data()));
        std::vector<Tensor> made;
        for (OrtValue* result : results) {
            Owned<OrtValue> owned(result, [](OrtValue* value) { api().ReleaseValue(value); });
            made.push_back(tensor_of(result));
        }
        return made;
    }

   private:
    ProgramEntry entry_;
    Owned<OrtSession> session_{nullptr, [](OrtSession* session) { api().ReleaseSession(session); }};
};

class OnnxRuntime final : public Backend {
   public:
    explicit OnnxRuntime(int threads) {
        OrtEnv* env = nullptr;
        check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "inferix", &env));
        env_.reset(env);
        OrtSessionOptions* options = nullptr;
        check(api().CreateSessionOptions(&options));
        options_.reset(options);
        check(api().SetIntraOpNumThreads(options, threads));
    }

    std::unique_ptr<Program> load(const ProgramEntry& entry) override {
        return std::make_unique<OnnxProgram>(env_.get(), options_.get(), entry);
    }

   private:
    Owned<OrtEnv> env_{nullptr, [](OrtEnv* env) { api().ReleaseEnv(env); }};
    Owned<OrtSessionOptions> options_{nullptr, [](OrtSessionOptions* options) { api().ReleaseSessionOptions(options); }};
};

}  // namespace

std::unique_ptr<Backend> make_onnxruntime(int threads) { return std::make_unique<OnnxRuntime>(threads); }

}  // namespace inferix
