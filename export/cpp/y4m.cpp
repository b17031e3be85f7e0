#include "y4m.hpp"

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "error.hpp"

namespace inferix {

Y4mWriter::Y4mWriter(const std::filesystem::path& path, int64_t width, int64_t height, int64_t fps)
    : path_(path), part_(path.string() + ".part"), file_(stdout), plane_(size_t(width * height)) {
    if (path_ != "-" && (file_ = std::fopen(part_.c_str(), "wb")) == nullptr)
        throw UsageError(in_quotes(path.string()) + " cannot be written; choose a folder that exists");
    std::string header = "YUV4MPEG2 W" + std::to_string(width) + " H" + std::to_string(height) + " F" +
                         std::to_string(fps) + ":1 Ip A1:1 C444\n";
    write(header.data(), header.size());
}

Y4mWriter::~Y4mWriter() {
    if (file_ == stdout) return;
    if (file_ != nullptr) {
        std::fclose(file_);
        std::remove(part_.c_str());
    }
}

void Y4mWriter::add(std::span<const uint8_t> pictures) {
    std::vector<uint8_t> planes(3 * plane_);
    for (size_t begin = 0; begin < pictures.size(); begin += 3 * plane_) {
        for (size_t place = 0; place < plane_; ++place) {
            const uint8_t* rgb = pictures.data() + begin + 3 * place;
            double r = rgb[0] / 255.0, g = rgb[1] / 255.0, b = rgb[2] / 255.0, y = 0.299 * r + 0.587 * g + 0.114 * b;
            planes[place] = uint8_t(std::nearbyint(16 + 219 * y));
            planes[plane_ + place] = uint8_t(std::nearbyint(128 + 224 * (b - y) / 1.772));
            planes[2 * plane_ + place] = uint8_t(std::nearbyint(128 + 224 * (r - y) / 1.402));
        }
        write("FRAME\n", 6);
        write(planes.data(), planes.size());
    }
    if (std::fflush(file_) != 0) throw std::runtime_error("the video cannot be written; is the disk full?");
}

void Y4mWriter::finish() {
    if (file_ == stdout) return;
    int failed = std::fclose(file_);
    file_ = nullptr;
    if (failed) throw std::runtime_error(in_quotes(path_.string()) + " cannot be written; is the disk full?");
    std::filesystem::rename(part_, path_);
}

void Y4mWriter::write(const void* data, size_t count) {
    if (std::fwrite(data, 1, count, file_) != count)
        throw std::runtime_error(in_quotes(path_.string()) + " cannot be written; is the disk full, or the reader gone?");
}

}  // namespace inferix
