// Tensors of float32 in host memory.
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

struct Tensor {
    Shape shape;
    std::vector<float> data;

    Tensor() = default;
    explicit Tensor(Shape sizes) : shape(std::move(sizes)), data(elements(shape)) {}
    Tensor(Shape sizes, std::vector<float> values) : shape(std::move(sizes)), data(std::move(values)) {}

    // Floats of one entry of the first axis.
    int64_t stride() const { return shape.empty() || shape[0] == 0 ? 0 : int64_t(data.size()) / shape[0]; }
};

// Contiguous floats that belong to a tensor elsewhere.
struct View {
    const float* data = nullptr;
    Shape shape;

    View() = default;
    View(const float* values, Shape sizes) : data(values), shape(std::move(sizes)) {}
    View(const Tensor& tensor) : data(tensor.data.data()), shape(tensor.shape) {}
};

}  // namespace inferix
