// The file of a saved stream: a magic, the engine's fingerprint, the state, and the SHA-256 of all before it.
// Integers and floats lie in the machine's byte order.
#pragma once

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <type_traits>
#include <vector>

#include "error.hpp"
#include "plan.hpp"
#include "tensor.hpp"

namespace inferix {

inline constexpr char save_magic[] = "inferix-stream 2\n";

template <class Derived>
class Archive {
   public:
    template <class... Value>
    void operator()(Value&... values) {
        (one(values), ...);
    }

   private:
    Derived& self() { return static_cast<Derived&>(*this); }

    template <class Value>
        requires(std::is_arithmetic_v<Value> || std::is_enum_v<Value>)
    void one(Value& value) {
        self().bytes(&value, sizeof value);
    }

    void one(std::string& text) { list(text); }
    void one(Tensor& tensor) { (*this)(tensor.shape, tensor.data, tensor.kind); }

    template <class Value>
    void one(std::vector<Value>& values) {
        list(values);
    }

    template <class List>
    void list(List& values) {
        uint64_t count = values.size();
        one(count);
        self().template resize<typename List::value_type>(values, count);
        if constexpr (std::is_arithmetic_v<typename List::value_type>) self().bytes(values.data(), count * sizeof(values[0]));
        else
            for (auto& value : values) one(value);
    }

    template <class Key, class Value>
    void one(std::map<Key, Value>& map) {
        uint64_t count = map.size();
        one(count);
        if constexpr (Derived::reads) {
            map.clear();
            for (uint64_t index = 0; index < count; ++index) {
                Key key{};
                one(key);
                one(map[key]);
            }
        } else {
            for (auto& [key, value] : map) {
                Key copy = key;
                (*this)(copy, value);
            }
        }
    }
};

class SaveFile : public Archive<SaveFile> {
   public:
    static constexpr bool reads = false;

    SaveFile(const std::filesystem::path& path, std::string fingerprint) : path_(path), content_(save_magic) {
        (*this)(fingerprint);
    }

    void bytes(const void* data, size_t count) { content_.append(static_cast<const char*>(data), count); }

    template <class Value, class List>
    void resize(List&, uint64_t) {}

    // Write the file beside its place, then give it its name.
    void finish() {
        std::filesystem::path part = path_;
        part += ".part";
        std::ofstream file(part, std::ios::binary);
        file << content_ << sha256(content_);
        file.close();
        if (!file) {
            std::filesystem::remove(part);
            throw std::runtime_error(in_quotes(path_.string()) + " cannot be written; is the disk full?");
        }
        std::filesystem::rename(part, path_);
    }

   private:
    std::filesystem::path path_;
    std::string content_;
};

class LoadFile : public Archive<LoadFile> {
   public:
    static constexpr bool reads = true;

    LoadFile(const std::filesystem::path& path, const std::string& fingerprint)
        : path_(path), content_(read_file(path)) {
        constexpr size_t digest = 64;
        if (!content_.starts_with(save_magic) || content_.size() < digest ||
            sha256(content_.substr(0, content_.size() - digest)) != content_.substr(content_.size() - digest))
            throw damaged();
        content_.resize(content_.size() - digest);
        place_ = std::strlen(save_magic);
        std::string of;
        (*this)(of);
        if (of != fingerprint)
            throw UsageError(in_quotes(path.string()) + " was saved on another engine; restore it on that one");
    }

    UsageError damaged() const {
        return UsageError(in_quotes(path_.string()) + " is no saved stream, or is cut or changed; copy it again");
    }

    void bytes(void* data, size_t count) {
        if (count > content_.size() - place_) throw damaged();
        std::memcpy(data, content_.data() + place_, count);
        place_ += count;
    }

    template <class Value, class List>
    void resize(List& values, uint64_t count) {
        if (count > content_.size() - place_) throw damaged();
        values.resize(count);
    }

    void finish() const {
        if (place_ != content_.size()) throw damaged();
    }

   private:
    std::filesystem::path path_;
    std::string content_;
    size_t place_ = 0;
};

}  // namespace inferix
