// YUV4MPEG2: uncompressed video that every tool reads. Colours are YUV 4:4:4 of BT.601 in limited range.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <span>

namespace inferix {

class Y4mWriter {
   public:
    // path: `-` for stdout. A file has its name once `finish` is called.
    Y4mWriter(const std::filesystem::path& path, int64_t width, int64_t height, int64_t fps);
    ~Y4mWriter();
    Y4mWriter(const Y4mWriter&) = delete;

    // Append RGB pictures [T, H, W, 3].
    void add(std::span<const uint8_t> pictures);
    void finish();

   private:
    void write(const void* data, size_t count);

    std::filesystem::path path_, part_;
    std::FILE* file_;
    size_t plane_;
};

}  // namespace inferix
