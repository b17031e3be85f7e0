// SHA-256 (FIPS 180-4) of files and strings.
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <fstream>

#include "error.hpp"
#include "plan.hpp"

namespace inferix {
namespace {

class Sha256 {
   public:
    void add(const char* bytes, size_t count) {
        length_ += count;
        while (count > 0) {
            size_t taken = std::min(count, block_.size() - filled_);
            std::memcpy(block_.data() + filled_, bytes, taken);
            filled_ += taken, bytes += taken, count -= taken;
            if (filled_ == block_.size()) compress(), filled_ = 0;
        }
    }

    std::string digest() {
        uint64_t bits = length_ * 8;
        add("\x80", 1);
        while (filled_ != 56) add("", 1);
        char tail[8];
        for (int byte = 0; byte < 8; ++byte) tail[byte] = char(bits >> (56 - 8 * byte));
        add(tail, 8);
        std::string made;
        for (uint32_t word : state_)
            for (int shift = 28; shift >= 0; shift -= 4) made += "0123456789abcdef"[word >> shift & 15];
        return made;
    }

   private:
    // The first 32 bits of the fractional part of a root of a prime: those constants define the function.
    static uint32_t fraction(long double root) { return uint32_t((root - std::floor(root)) * 0x1p32L); }

    struct Constants {
        std::array<uint32_t, 64> cubes;
        std::array<uint32_t, 8> squares;
        Constants() {
            for (int number = 2, found = 0; found < 64; ++number) {
                bool prime = true;
                for (int factor = 2; factor * factor <= number; ++factor) prime &= number % factor != 0;
                if (!prime) continue;
                if (found < 8) squares[found] = fraction(std::sqrt((long double)number));
                cubes[found++] = fraction(std::cbrt((long double)number));
            }
        }
    };

    static const Constants& constants() {
        static const Constants made;
        return made;
    }

    void compress() {
        std::array<uint32_t, 64> w;
        for (int i = 0; i < 16; ++i) {
            const auto* byte = block_.data() + 4 * i;
            w[i] = uint32_t(byte[0]) << 24 | uint32_t(byte[1]) << 16 | uint32_t(byte[2]) << 8 | byte[3];
        }
        for (int i = 16; i < 64; ++i) {
            uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + (std::rotr(a, 7) ^ std::rotr(a, 18) ^ a >> 3) + w[i - 7] +
                   (std::rotr(b, 17) ^ std::rotr(b, 19) ^ b >> 10);
        }
        auto [a, b, c, d, e, f, g, h] = state_;
        for (int i = 0; i < 64; ++i) {
            uint32_t first = h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) + ((e & f) ^ (~e & g)) +
                             constants().cubes[i] + w[i];
            uint32_t second = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
        }
        const uint32_t added[] = {a, b, c, d, e, f, g, h};
        for (int i = 0; i < 8; ++i) state_[i] += added[i];
    }

    std::array<uint32_t, 8> state_ = constants().squares;
    std::array<unsigned char, 64> block_;
    size_t filled_ = 0;
    uint64_t length_ = 0;
};

}  // namespace

std::string sha256(const std::string& bytes) {
    Sha256 hash;
    hash.add(bytes.data(), bytes.size());
    return hash.digest();
}

std::string file_sha256(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw UsageError(in_quotes(path.string()) + " cannot be read; check its permissions");
    Sha256 hash;
    std::vector<char> bytes(1 << 20);
    while (file.read(bytes.data(), std::streamsize(bytes.size())), file.gcount() > 0)
        hash.add(bytes.data(), size_t(file.gcount()));
    return hash.digest();
}

}  // namespace inferix
