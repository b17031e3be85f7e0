// Tensors in host memory. All hold float32; what a program takes or gives as another type is converted at its border.
#pragma once

#include <cstdint>
#include <functional>
#include <numeric>
#include <span>
#include <vector>

namespace inferix {

using Shape = std::vector<int64_t>;

inline int64_t elements(std::span<const int64_t> shape) {
    return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// Type of a tensor's elements for programs.
enum class Kind : uint8_t { real, integer, truth };

struct Tensor {
    Shape shape;
    std::vector<float> data;
    Kind kind = Kind::real;

    Tensor() = default;
    explicit Tensor(Shape sizes) : shape(std::move(sizes)), data(elements(shape)) {}
    Tensor(Shape sizes, std::vector<float> values, Kind type = Kind::real)
        : shape(std::move(sizes)), data(std::move(values)), kind(type) {}

    // Floats of one entry of the first axis.
    int64_t stride() const { return shape.empty() || shape[0] == 0 ? 0 : int64_t(data.size()) / shape[0]; }
};

// Contiguous floats that belong to a tensor elsewhere.
struct View {
    const float* data = nullptr;
    Shape shape;
    Kind kind = Kind::real;

    View() = default;
    View(const float* values, Shape sizes) : data(values), shape(std::move(sizes)) {}
    View(const Tensor& tensor) : data(tensor.data.data()), shape(tensor.shape), kind(tensor.kind) {}

    // The elements as another type.
    template <class Element>
    std::vector<Element> as() const {
        std::vector<Element> made(elements(shape));
        for (size_t index = 0; index < made.size(); ++index) made[index] = Element(data[index]);
        return made;
    }
};

}  // namespace inferix
