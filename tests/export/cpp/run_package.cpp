// Runs an AOTInductor package that keeps our ops: run_package PACKAGE OUT INPUT:2x3... Files hold float32 values.
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>

int main(int count, char** values) {
    try {
        torch::inductor::AOTIModelPackageLoader loader(values[1]);
        std::vector<std::vector<char>> contents;
        std::vector<at::Tensor> inputs;
        for (int index = 3; index < count; ++index) {
            std::string argument = values[index];
            size_t colon = argument.rfind(':');
            std::ifstream file(argument.substr(0, colon), std::ios::binary);
            contents.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
            std::vector<int64_t> shape;
            std::stringstream sizes(argument.substr(colon + 1));
            for (std::string size; std::getline(sizes, size, 'x');) shape.push_back(std::stoll(size));
            inputs.push_back(at::from_blob(contents.back().data(), shape, at::kFloat));
        }
        at::Tensor result = loader.run(inputs).at(0).contiguous();
        std::ofstream(values[2], std::ios::binary).write(static_cast<const char*>(result.const_data_ptr()), result.nbytes());
        return 0;
    } catch (const std::exception& error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
