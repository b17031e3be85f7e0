/* A fake of TensorRT for tests: an engine that doubles `x` [n] into `y` [n], and ignores `past`, whose first axis is at
 * most 6. It has the part of the interface of TensorRT 10.15 that backend_tensorrt.cpp uses, and records its calls. */
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "calls.hpp"
#include "cuda_runtime_api.h"

inline int32_t fake_version = 101500;
inline int32_t getInferLibVersion() noexcept { return fake_version; }

namespace nvinfer1 {

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };

struct Dims {
    int32_t nbDims;
    int64_t d[8];
};

class ILogger {
   public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const char* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext : fake::Counted {
   public:
    bool setInputShape(const char* name, const Dims& shape) noexcept {
        std::string sizes = name;
        for (int32_t axis = 0; axis < shape.nbDims; ++axis) (sizes += ' ') += std::to_string(shape.d[axis]);
        fake::record("shape", sizes);
        shapes_[name] = shape;
        return std::string(name) != "past" || shape.d[0] <= 6;
    }

    Dims getTensorShape(const char* name) const noexcept {
        fake::record("ask", name);
        auto found = shapes_.find("x");
        return found == shapes_.end() ? Dims{-1, {}} : found->second;
    }

    bool setTensorAddress(const char* name, void* place) noexcept {
        fake::record("address", name);
        places_[name] = static_cast<float*>(place);
        return place != nullptr;
    }

    bool enqueueV3(cudaStream_t) noexcept {
        fake::record("enqueue");
        if (fake::fails() || places_["past"] == nullptr) return false;
        for (int64_t index = 0; index < shapes_["x"].d[0]; ++index) places_["y"][index] = 2 * places_["x"][index];
        return true;
    }

   private:
    std::map<std::string, Dims> shapes_;
    std::map<std::string, float*> places_;
};

class ICudaEngine : fake::Counted {
   public:
    TensorIOMode getTensorIOMode(const char* name) const noexcept {
        if (std::string(name) == "y") return TensorIOMode::kOUTPUT;
        return std::string(name) == "x" || std::string(name) == "past" ? TensorIOMode::kINPUT : TensorIOMode::kNONE;
    }
    DataType getTensorDataType(const char*) const noexcept { return DataType::kFLOAT; }
    IExecutionContext* createExecutionContext() noexcept { return new IExecutionContext; }
};

class IRuntime : fake::Counted {
   public:
    explicit IRuntime(ILogger& logger) : logger_(logger) {}

    ICudaEngine* deserializeCudaEngine(const void* content, size_t bytes) noexcept {
        fake::record("deserialise", bytes);
        if (std::string(static_cast<const char*>(content), bytes) == "good") return new ICudaEngine;
        logger_.log(ILogger::Severity::kWARNING, "a warning");
        logger_.log(ILogger::Severity::kERROR, "built for another GPU");
        logger_.log(ILogger::Severity::kINFO, "some news");
        return nullptr;
    }

   private:
    ILogger& logger_;
};

inline IRuntime* createInferRuntime(ILogger& logger) noexcept { return new IRuntime(logger); }

}  // namespace nvinfer1
