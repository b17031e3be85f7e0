// Programs compiled by AOTInductor, run by libtorch on the CPU.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/version.h>

#include "backend.hpp"
#include "error.hpp"

namespace inferix {
namespace {

class AotiProgram final : public Program {
   public:
    explicit AotiProgram(const ProgramEntry& entry) : loader_(entry.path.string()) {}

    std::vector<Tensor> run(const std::vector<View>& inputs) override {
        c10::InferenceMode guard;
        std::vector<at::Tensor> given;
        for (const View& view : inputs) {
            at::Tensor floats = at::from_blob(const_cast<float*>(view.data), view.shape, at::kFloat);
            given.push_back(view.kind == Kind::real ? floats
                                                    : floats.to(view.kind == Kind::integer ? at::kLong : at::kBool));
        }
        std::vector<Tensor> made;
        for (const at::Tensor& result : loader_.run(given)) {
            at::Tensor whole = result.to(at::kFloat).contiguous();
            const float* data = whole.const_data_ptr<float>();
            made.emplace_back(whole.sizes().vec(), std::vector<float>(data, data + whole.numel()),
                              result.scalar_type() == at::kBool ? Kind::truth : Kind::real);
        }
        return made;
    }

   private:
    torch::inductor::AOTIModelPackageLoader loader_;
};

class AotInductor final : public Backend {
   public:
    AotInductor(const Plan& plan, int threads) {
        const Json& built = plan.at("built");
        std::string torch = built.at("packages").at("torch").string(), cpu = built.at("options").at("cpu").string();
        std::string release = std::to_string(TORCH_VERSION_MAJOR) + "." + std::to_string(TORCH_VERSION_MINOR) + ".";
        std::string where = "engine " + in_quotes(plan.folder.string());
        if (!torch.starts_with(release))
            throw UsageError(where + " was compiled by torch " + torch + ", but this runner was built with " + release +
                             "*; export it again or build again");
        if (cpu != at::get_cpu_capability())
            throw UsageError(where + " was compiled for a CPU with " + cpu + ", but this one has " +
                             at::get_cpu_capability() + "; export it again here");
        if (threads > 0) at::set_num_threads(threads);
    }

    std::unique_ptr<Program> load(const ProgramEntry& entry) override { return std::make_unique<AotiProgram>(entry); }
};

}  // namespace

std::unique_ptr<Backend> make_aotinductor(const Plan& plan, int threads) {
    return std::make_unique<AotInductor>(plan, threads);
}

}  // namespace inferix
