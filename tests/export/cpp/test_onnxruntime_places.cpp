// The places, numbers and types of onnxruntime_table.hpp against ONNX Runtime's own header.
#include <onnxruntime_c_api.h>

#include <cstddef>

#include "onnxruntime_table.hpp"

using namespace inferix;

#define SAME_PLACE(ours, theirs) \
    static_assert(decltype(ort::Functions::ours)::place * sizeof(void*) == offsetof(OrtApi, theirs), #theirs)

SAME_PLACE(error_message, GetErrorMessage);
SAME_PLACE(create_env, CreateEnv);
SAME_PLACE(create_session, CreateSession);
SAME_PLACE(run, Run);
SAME_PLACE(create_session_options, CreateSessionOptions);
SAME_PLACE(set_threads, SetIntraOpNumThreads);
SAME_PLACE(create_tensor, CreateTensorWithDataAsOrtValue);
SAME_PLACE(tensor_data, GetTensorMutableData);
SAME_PLACE(element_type, GetTensorElementType);
SAME_PLACE(axis_count, GetDimensionsCount);
SAME_PLACE(axes, GetDimensions);
SAME_PLACE(shape, GetTensorTypeAndShape);
SAME_PLACE(create_cpu_memory, CreateCpuMemoryInfo);
SAME_PLACE(release_env, ReleaseEnv);
SAME_PLACE(release_status, ReleaseStatus);
SAME_PLACE(release_session, ReleaseSession);
SAME_PLACE(release_value, ReleaseValue);
SAME_PLACE(release_shape, ReleaseTensorTypeAndShapeInfo);
SAME_PLACE(release_session_options, ReleaseSessionOptions);
SAME_PLACE(add_session_config_entry, AddSessionConfigEntry);
static_assert(offsetof(ort::Base, table) == offsetof(OrtApiBase, GetApi));
static_assert(offsetof(ort::Base, release) == offsetof(OrtApiBase, GetVersionString));
static_assert(ort::log_errors == ORT_LOGGING_LEVEL_ERROR && ort::arena == OrtArenaAllocator);
static_assert(ort::int64 == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 && ort::boolean == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL);
static_assert(ort::default_memory == OrtMemTypeDefault && ort::float32 == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT);

int main() {}
