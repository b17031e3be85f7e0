// Programs by OpenVINO on the CPU.
#include <openvino/openvino.hpp>

#include "backend.hpp"

namespace inferix {
namespace {

class OpenVinoProgram final : public Program {
   public:
    OpenVinoProgram(ov::CompiledModel model, const ProgramEntry& entry)
        : request_(model.create_infer_request()), entry_(entry) {}

    std::vector<Tensor> run(const std::vector<View>& inputs) override {
        static float none;  // for an empty tensor, which has no data
        for (size_t index = 0; index < inputs.size(); ++index) {
            const View& view = inputs[index];
            void* data = view.data == nullptr ? &none : const_cast<float*>(view.data);
            ov::Shape shape(view.shape.begin(), view.shape.end());
            request_.set_tensor(entry_.inputs[index], ov::Tensor(ov::element::f32, shape, data));
        }
        request_.infer();
        std::vector<Tensor> made;
        for (const std::string& name : entry_.outputs) {
            ov::Tensor result = request_.get_tensor(name);
            const float* data = result.data<float>();
            ov::Shape sizes = result.get_shape();
            made.emplace_back(Shape(sizes.begin(), sizes.end()), std::vector<float>(data, data + result.get_size()));
        }
        return made;
    }

   private:
    ov::InferRequest request_;
    ProgramEntry entry_;
};

class OpenVino final : public Backend {
   public:
    explicit OpenVino(int threads) : threads_(threads) {}

    std::unique_ptr<Program> load(const ProgramEntry& entry) override {
        // by default OpenVINO computes in bfloat16 on CPUs that have it
        auto model = core_.compile_model(entry.path.string(), "CPU", ov::hint::inference_precision(ov::element::f32),
                                         ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                                         ov::inference_num_threads(threads_));
        return std::make_unique<OpenVinoProgram>(std::move(model), entry);
    }

   private:
    ov::Core core_;
    int threads_;
};

}  // namespace

std::unique_ptr<Backend> make_openvino(int threads) { return std::make_unique<OpenVino>(threads); }

}  // namespace inferix
