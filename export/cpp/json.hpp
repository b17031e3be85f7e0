// A reader of JSON (RFC 8259), for plan.json.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace inferix {

// One value. Numbers are doubles: exact for integers below 2^53.
class Json {
   public:
    enum class Kind { null, boolean, number, text, list, object };

    Kind kind = Kind::null;
    bool boolean = false;
    double number = 0;
    std::string text;
    std::vector<Json> list;
    std::map<std::string, Json> object;

    // Parse a document; UsageError for a malformed one. name: of the file, for the message.
    static Json parse(std::string_view document, const std::string& name);

    bool has(const std::string& key) const { return object.contains(key); }

    // The member of an object, or the value as a type; UsageError if it is not there or is another type.
    const Json& at(const std::string& key) const;
    double real() const;
    int64_t integer() const;
    bool truth() const;
    const std::string& string() const;
    const std::vector<Json>& items() const;
    std::vector<double> reals() const;
    std::vector<int64_t> integers() const;
    std::vector<std::string> strings() const;
};

}  // namespace inferix
