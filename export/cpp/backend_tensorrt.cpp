// Programs built by TensorRT, run on the GPU. Never run: no GPU was available to this version. Its test compiles this
// file with a fake of TensorRT and CUDA and checks the calls.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>

#include "backend.hpp"
#include "error.hpp"

namespace inferix {
namespace {

void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Keeps the last error of TensorRT, for messages.
class Log final : public nvinfer1::ILogger {
   public:
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kERROR) last_ = message;
    }
    // ": " and the error, or nothing.
    std::string reason() const { return last_.empty() ? "" : ": " + last_; }

   private:
    std::string last_;
};

// Memory of the GPU that grows, so that the address of a tensor changes only when it must.
class DeviceBuffer {
   public:
    DeviceBuffer() = default;
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;
    ~DeviceBuffer() { cudaFree(data_); }

    void* of(size_t bytes) {
        bytes = std::max(bytes, sizeof(float));  // a tensor without elements needs an address too
        if (bytes > size_) {
            check(cudaFree(data_));
            data_ = nullptr, size_ = 0;
            check(cudaMalloc(&data_, bytes));
            size_ = bytes;
        }
        return data_;
    }

   private:
    void* data_ = nullptr;
    size_t size_ = 0;
};

class CudaStream {
   public:
    CudaStream() { check(cudaStreamCreate(&stream)); }
    CudaStream(const CudaStream&) = delete;
    CudaStream& operator=(const CudaStream&) = delete;
    ~CudaStream() { cudaStreamDestroy(stream); }

    cudaStream_t stream = nullptr;
};

std::string listed(std::span<const int64_t> shape) {
    std::string made;
    for (int64_t size : shape) made += (made.empty() ? "" : ", ") + std::to_string(size);
    return "[" + made + "]";
}

class TensorRtProgram final : public Program {
   public:
    TensorRtProgram(nvinfer1::IRuntime& runtime, const Log& log, const ProgramEntry& entry) : entry_(entry), log_(log) {
        std::string content = read_file(entry.path);
        engine_.reset(runtime.deserializeCudaEngine(content.data(), content.size()));
        if (!engine_)
            throw UsageError("TensorRT refuses " + where() + log_.reason() +
                             "; export it again on this GPU and with this version");
        for (auto [names, mode] : {std::pair(&entry_.inputs, nvinfer1::TensorIOMode::kINPUT),
                                   std::pair(&entry_.outputs, nvinfer1::TensorIOMode::kOUTPUT)})
            for (const std::string& name : *names)
                if (engine_->getTensorIOMode(name.c_str()) != mode ||
                    engine_->getTensorDataType(name.c_str()) != nvinfer1::DataType::kFLOAT)
                    throw UsageError(where() + " has no float32 tensor " + in_quotes(name) +
                                     " as plan.json says; export the engine again");
        context_.reset(engine_->createExecutionContext());
        if (!context_) throw std::runtime_error("TensorRT cannot run " + where() + log_.reason());
    }

    std::vector<Tensor> run(const std::vector<View>& inputs) override {
        for (size_t index = 0; index < inputs.size(); ++index) {
            const std::string& name = entry_.inputs[index];
            const View& view = inputs[index];
            size_t bytes = size_t(elements(view.shape)) * sizeof(float);
            void* place = buffers_[name].of(bytes);
            nvinfer1::Dims shape{};
            shape.nbDims = int32_t(view.shape.size());
            std::ranges::copy(view.shape, shape.d);
            if (!context_->setInputShape(name.c_str(), shape))
                throw UsageError(where() + " was not built for " + in_quotes(name) + " of " + listed(view.shape) +
                                 "; export the engine again at this size");
            if (bytes > 0) check(cudaMemcpyAsync(place, view.data, bytes, cudaMemcpyHostToDevice, stream_.stream));
            bind(name, place);
        }
        std::vector<Tensor> made;
        for (const std::string& name : entry_.outputs) {
            nvinfer1::Dims shape = context_->getTensorShape(name.c_str());
            if (shape.nbDims < 0 || std::ranges::any_of(std::span(shape.d, size_t(shape.nbDims)), is_unknown))
                throw std::runtime_error("TensorRT does not know the shape of " + in_quotes(name) + " of " + where());
            made.emplace_back(Shape(shape.d, shape.d + shape.nbDims));
            bind(name, buffers_[name].of(made.back().data.size() * sizeof(float)));
        }
        if (!context_->enqueueV3(stream_.stream))
            throw std::runtime_error("TensorRT failed to run " + where() + log_.reason());
        for (size_t index = 0; index < made.size(); ++index) {
            size_t bytes = made[index].data.size() * sizeof(float);
            void* place = buffers_[entry_.outputs[index]].of(bytes);
            if (bytes > 0)
                check(cudaMemcpyAsync(made[index].data.data(), place, bytes, cudaMemcpyDeviceToHost, stream_.stream));
        }
        check(cudaStreamSynchronize(stream_.stream));
        return made;
    }

   private:
    static bool is_unknown(int64_t size) { return size < 0; }

    std::string where() const { return in_quotes(entry_.path.string()); }

    void bind(const std::string& name, void* place) {
        if (!context_->setTensorAddress(name.c_str(), place))
            throw std::runtime_error("TensorRT takes no address for " + in_quotes(name) + " of " + where() +
                                     log_.reason());
    }

    ProgramEntry entry_;
    const Log& log_;
    CudaStream stream_;
    std::map<std::string, DeviceBuffer> buffers_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

class TensorRt final : public Backend {
   public:
    explicit TensorRt(const Plan& plan) {
        std::string built = plan.at("built").at("packages").at("tensorrt").string();
        int32_t here = getInferLibVersion();  // 101500 for 10.15.0
        std::string release = std::to_string(here / 10000) + "." + std::to_string(here / 100 % 100);
        if (!built.starts_with(release + "."))
            throw UsageError("engine " + in_quotes(plan.folder.string()) + " was built by TensorRT " + built +
                             ", but this is " + release + "; export it again here");
        runtime_.reset(nvinfer1::createInferRuntime(log_));
        if (!runtime_) throw std::runtime_error("TensorRT cannot start" + log_.reason());
    }

    std::unique_ptr<Program> load(const ProgramEntry& entry) override {
        return std::make_unique<TensorRtProgram>(*runtime_, log_, entry);
    }

   private:
    Log log_;
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
};

}  // namespace

std::unique_ptr<Backend> make_tensorrt(const Plan& plan) { return std::make_unique<TensorRt>(plan); }

}  // namespace inferix
