// Backends: runtimes that run the programs of an engine, one for each target.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "plan.hpp"
#include "tensor.hpp"

namespace inferix {

class Program {
   public:
    virtual ~Program() = default;
    // inputs and results: in the order of the plan's names.
    virtual std::vector<Tensor> run(const std::vector<View>& inputs) = 0;
};

class Backend {
   public:
    virtual ~Backend() = default;
    virtual std::unique_ptr<Program> load(const ProgramEntry& entry) = 0;
};

// The backend for a plan's target. threads: of each program, 0 for the runtime's own number. UsageError for a target
// that this build has no backend for, or programs that were compiled for another machine or version of the runtime.
std::unique_ptr<Backend> make_backend(const Plan& plan, int threads);

// Targets that this build has backends for.
std::vector<std::string> built_targets();

#ifdef INFERIX_ONNXRUNTIME
std::unique_ptr<Backend> make_onnxruntime(int threads);
#endif
#ifdef INFERIX_OPENVINO
std::unique_ptr<Backend> make_openvino(int threads);
#endif
#ifdef INFERIX_TORCH
std::unique_ptr<Backend> make_aotinductor(const Plan& plan, int threads);
#endif
#ifdef INFERIX_TENSORRT
std::unique_ptr<Backend> make_tensorrt(const Plan& plan);
#endif

}  // namespace inferix
