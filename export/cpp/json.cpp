#include "json.hpp"

#include <charconv>
#include <cstdint>

#include "error.hpp"

namespace inferix {
namespace {

constexpr int deepest = 100;  // nested lists and objects

class Parser {
   public:
    Parser(std::string_view document, const std::string& name) : rest_(document), size_(document.size()), name_(name) {}

    Json document() {
        Json value = parse(0);
        skip();
        if (!rest_.empty()) fail("nothing more");
        return value;
    }

   private:
    Json parse(int depth) {
        if (depth > deepest) fail("fewer nested values");
        skip();
        Json value;
        if (take("null")) return value;
        if (take("true") || take("false")) {
            value.kind = Json::Kind::boolean;
            value.boolean = last_ == "true";
        } else if (take("{")) {
            value.kind = Json::Kind::object;
            members('}', [&] {
                skip();
                expect("\"");
                std::string key = string();
                skip();
                expect(":");
                value.object.insert_or_assign(std::move(key), parse(depth + 1));
            });
        } else if (take("[")) {
            value.kind = Json::Kind::list;
            members(']', [&] { value.list.push_back(parse(depth + 1)); });
        } else if (take("\"")) {
            value.kind = Json::Kind::text;
            value.text = string();
        } else {
            value.kind = Json::Kind::number;
            auto [end, error] = std::from_chars(rest_.data(), rest_.data() + rest_.size(), value.number);
            if (error != std::errc()) fail("a value");
            rest_.remove_prefix(end - rest_.data());
        }
        return value;
    }

    template <class Member>
    void members(char end, Member member) {
        skip();
        if (take(std::string_view(&end, 1))) return;
        do {
            member();
            skip();
        } while (take(","));
        expect(std::string_view(&end, 1));
    }

    std::string string() {
        std::string made;
        for (;;) {
            if (rest_.empty()) fail("the end of a string");
            char next = rest_.front();
            rest_.remove_prefix(1);
            if (next == '"') return made;
            if (next != '\\') {
                made += next;
                continue;
            }
            if (rest_.empty()) fail("an escape");
            char escape = rest_.front();
            rest_.remove_prefix(1);
            constexpr std::string_view names = "\"\\/bfnrt", values = "\"\\/\b\f\n\r\t";
            if (size_t index = names.find(escape); index != names.npos) made += values[index];
            else if (escape == 'u') append(made, code_point());
            else fail("an escape");
        }
    }

    uint32_t code_point() {
        uint32_t code = unit();
        if (code < 0xD800 || code > 0xDBFF) return code;
        expect("\\u");  // the second half of a pair
        return 0x10000 + ((code - 0xD800) << 10) + (unit() - 0xDC00);
    }

    uint32_t unit() {
        uint32_t value = 0;
        if (rest_.size() < 4 || std::from_chars(rest_.data(), rest_.data() + 4, value, 16).ptr != rest_.data() + 4)
            fail("four hexadecimal digits");
        rest_.remove_prefix(4);
        return value;
    }

    static void append(std::string& made, uint32_t code) {  // as UTF-8
        if (code < 0x80) made += char(code);
        else if (code < 0x800) (made += char(0xC0 | code >> 6)) += char(0x80 | (code & 0x3F));
        else if (code < 0x10000)
            ((made += char(0xE0 | code >> 12)) += char(0x80 | (code >> 6 & 0x3F))) += char(0x80 | (code & 0x3F));
        else
            (((made += char(0xF0 | code >> 18)) += char(0x80 | (code >> 12 & 0x3F))) +=
             char(0x80 | (code >> 6 & 0x3F))) += char(0x80 | (code & 0x3F));
    }

    void skip() { rest_.remove_prefix(std::min(rest_.find_first_not_of(" \t\r\n"), rest_.size())); }

    bool take(std::string_view word) {
        if (!rest_.starts_with(word)) return false;
        last_ = word;
        rest_.remove_prefix(word.size());
        return true;
    }

    void expect(std::string_view word) {
        if (!take(word)) fail(std::string(word));
    }

    [[noreturn]] void fail(const std::string& expected) const {
        throw UsageError(name_ + " is not valid JSON at byte " + std::to_string(size_ - rest_.size()) + ": expected " +
                         expected + "; copy the engine again, or export it again");
    }

    std::string_view rest_, last_;
    size_t size_;
    const std::string& name_;
};

template <class Value>
const Value& checked(const Json& json, Json::Kind kind, const Value& value) {
    if (json.kind != kind) throw UsageError("plan.json has a value of another type; export the engine again");
    return value;
}

}  // namespace

Json Json::parse(std::string_view document, const std::string& name) { return Parser(document, name).document(); }

const Json& Json::at(const std::string& key) const {
    auto found = checked(*this, Kind::object, object).find(key);
    if (found == object.end()) throw UsageError("plan.json has no " + key + "; export the engine again");
    return found->second;
}

double Json::real() const { return checked(*this, Kind::number, number); }
int64_t Json::integer() const { return int64_t(real()); }
bool Json::truth() const { return checked(*this, Kind::boolean, boolean); }
const std::string& Json::string() const { return checked(*this, Kind::text, text); }
const std::vector<Json>& Json::items() const { return checked(*this, Kind::list, list); }

std::vector<double> Json::reals() const {
    std::vector<double> made;
    for (const Json& item : items()) made.push_back(item.real());
    return made;
}

std::vector<int64_t> Json::integers() const {
    std::vector<int64_t> made;
    for (const Json& item : items()) made.push_back(item.integer());
    return made;
}

std::vector<std::string> Json::strings() const {
    std::vector<std::string> made;
    for (const Json& item : items()) made.push_back(item.string());
    return made;
}

}  // namespace inferix
