#include "backend.hpp"

#include "error.hpp"

namespace inferix {

std::vector<std::string> built_targets() {
    return {
#ifdef INFERIX_ONNXRUNTIME
        "onnx",
#endif
#ifdef INFERIX_OPENVINO
        "openvino",
#endif
#ifdef INFERIX_TORCH
        "aoti",
#endif
#ifdef INFERIX_TENSORRT
        "tensorrt",
#endif
    };
}

std::unique_ptr<Backend> make_backend(const Plan& plan, [[maybe_unused]] int threads) {
    const std::string& target = plan.at("target").string();
#ifdef INFERIX_ONNXRUNTIME
    if (target == "onnx") return make_onnxruntime(threads);
#endif
#ifdef INFERIX_OPENVINO
    if (target == "openvino") return make_openvino(threads);
#endif
#ifdef INFERIX_TORCH
    if (target == "aoti") return make_aotinductor(plan, threads);
#endif
#ifdef INFERIX_TENSORRT
    if (target == "tensorrt") return make_tensorrt(plan);
#endif
    std::string names;
    for (const std::string& name : built_targets()) names += (names.empty() ? "" : ", ") + name;
    throw UsageError("engine " + in_quotes(plan.folder.string()) + " has target " + in_quotes(target) +
                     ", and this runner was built for " + (names.empty() ? "none" : names) +
                     "; build it where cmake finds that runtime, or use inferix-run");
}

}  // namespace inferix
