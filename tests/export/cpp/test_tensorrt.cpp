// The backend for TensorRT over a fake of it: the order of its calls, shapes, addresses, results, and bad engines.
#include <NvInfer.h>

#include <unistd.h>

#include <cstdio>
#include <fstream>

#include "backend.hpp"
#include "error.hpp"

using namespace inferix;

namespace inferix {
std::unique_ptr<Backend> make_tensorrt(const Plan& plan);
}

namespace {

int failures = 0;

void expect(bool right, const char* what) {
    if (!right) std::printf("wrong: %s\n", what), ++failures;
}

// Expect an error of a type whose message has all of these words.
template <class Error, class Call>
void expect_error(const char* what, std::initializer_list<const char*> words, Call call) {
    try {
        call();
        expect(false, what);
    } catch (const Error& error) {
        for (const char* word : words)
            if (std::string(error.what()).find(word) == std::string::npos)
                std::printf("wrong: %s: '%s' lacks '%s'\n", what, error.what(), word), ++failures;
    }
}

Plan plan_of(const std::string& version) {
    return {"engine", Json::parse(R"({"built": {"packages": {"tensorrt": ")" + version + R"("}}})", "plan")};
}

}  // namespace

int main() {
    std::filesystem::path folder = std::filesystem::temp_directory_path() / ("inferix-tensorrt-" + std::to_string(getpid()));
    std::filesystem::create_directory(folder);
    ProgramEntry good{folder / "good.engine", {"x", "past"}, {"y"}}, bad{folder / "bad.engine", {"x"}, {"y"}};
    std::ofstream(good.path) << "good";
    std::ofstream(bad.path) << "bad";
    {
        auto backend = make_tensorrt(plan_of("10.15.1.29"));
        auto program = backend->load(good);
        expect(std::exchange(fake::calls, {}) == std::vector<std::string>{"deserialise 4"}, "calls of a load");
        Tensor x({3}, {1, 2, 3}), empty({0, 2});
        std::vector<Tensor> made = program->run({x, empty});
        expect(made.size() == 1 && made[0].shape == Shape{3} && made[0].data == std::vector<float>{2, 4, 6}, "results");
        const std::vector<std::string> first{
            "malloc 12", "shape x 3", "upload 12", "address x", "malloc 4", "shape past 0 2", "address past", "ask y",
            "malloc 12", "address y", "enqueue", "download 12", "synchronise"};
        expect(std::exchange(fake::calls, {}) == first, "calls of the first run");
        Tensor past({1, 1}, {5}), short_x({1}, {4});  // as large as before or smaller: no new memory
        expect(program->run({short_x, past})[0].data == std::vector<float>{8}, "results of a second run");
        for (const std::string& call : std::exchange(fake::calls, {}))
            expect(!call.starts_with("malloc"), "memory is used again");
        expect_error<UsageError>("another size", {"past", "[7, 2]", "good.engine"}, [&] { program->run({x, Tensor({7, 2})}); });
        fake::fail_next = true;
        expect_error<std::runtime_error>("no memory", {"CUDA", "memory"}, [&] { program->run({Tensor({9}), past}); });
        expect(program->run({Tensor({9}), past})[0].shape == Shape{9}, "a run after a failed one");
        fake::calls.clear();
        expect_error<UsageError>("another GPU", {"bad.engine", "built for another GPU"}, [&] { backend->load(bad); });
        expect_error<UsageError>("another name", {"good.engine", "'z'"}, [&] { backend->load({good.path, {"z"}, {"y"}}); });
        expect_error<UsageError>("an output as input", {"'y'"}, [&] { backend->load({good.path, {"y"}, {"y"}}); });
        program->run({x, past});
        fake::fail_next = true;
        expect_error<std::runtime_error>("a failed run", {"good.engine"}, [&] { program->run({x, past}); });
    }
    expect(fake::live == 0, "all objects and memory are freed");
    expect_error<UsageError>("another version", {"10.14.1", "10.15"}, [] { make_tensorrt(plan_of("10.14.1")); });
    expect_error<UsageError>("a version that begins alike", {"10.150.0"}, [] { make_tensorrt(plan_of("10.150.0")); });
    expect(fake::live == 0, "nothing is left of refused engines");
    std::filesystem::remove_all(folder);
    std::printf("%s\n", failures ? "failed" : "the calls are as expected");
    return failures != 0;
}
