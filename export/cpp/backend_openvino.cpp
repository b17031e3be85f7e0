// Programs by OpenVINO on the CPU.
#include <algorithm>

#include <openvino/openvino.hpp>

#include "backend.hpp"

namespace inferix {
namespace {

// A tensor of its own with the elements of a view.
template <class Element>
ov::Tensor copied(const ov::element::Type& type, const View& view) {
    ov::Tensor made(type, ov::Shape(view.shape.begin(), view.shape.end()));
    std::ranges::copy(view.as<Element>(), static_cast<Element*>(made.data()));
    return made;
}

class OpenVinoProgram final : public Program {
   public:
    OpenVinoProgram(ov::CompiledModel model, const ProgramEntry& entry)
        : request_(model.create_infer_request()), entry_(entry) {}

    std::vector<Tensor> run(const std::vector<View>& inputs) override {
        static float none;  // for an empty tensor, which has no data
        for (size_t index = 0; index < inputs.size(); ++index) {
            const View& view = inputs[index];
            ov::Shape shape(view.shape.begin(), view.shape.end());
            if (view.kind == Kind::integer) {
                request_.set_tensor(entry_.inputs[index], copied<int64_t>(ov::element::i64, view));
            } else if (view.kind == Kind::truth) {
                request_.set_tensor(entry_.inputs[index], copied<char>(ov::element::boolean, view));
            } else {
                void* data = view.data == nullptr ? &none : const_cast<float*>(view.data);
                request_.set_tensor(entry_.inputs[index], ov::Tensor(ov::element::f32, shape, data));
            }
        }
        request_.infer();
        std::vector<Tensor> made;
        for (const std::string& name : entry_.outputs) {
            ov::Tensor result = request_.get_tensor(name);
            ov::Shape sizes = result.get_shape();
            Shape shape(sizes.begin(), sizes.end());
            if (result.get_element_type() == ov::element::boolean) {
                const char* data = result.data<char>();
                made.emplace_back(shape, std::vector<float>(data, data + result.get_size()), Kind::truth);
            } else {
                const float* data = result.data<float>();
                made.emplace_back(shape, std::vector<float>(data, data + result.get_size()));
            }
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
