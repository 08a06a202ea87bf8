/* The C interface for Kotlin and Java: LlamaRunner.kt declares these functions. */

#include <jni.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "llama_runner.h"

static void throw_last_error(JNIEnv* env) {
    const jclass type = (*env)->FindClass(env, "java/lang/IllegalArgumentException");
    if (type != NULL) (*env)->ThrowNew(env, type, llama_runner_last_error());
}

JNIEXPORT jlong JNICALL Java_org_llamapte_LlamaRunner_open(JNIEnv* env, jobject self, jstring path, jlong threads) {
    (void)self;
    const char* const name = (*env)->GetStringUTFChars(env, path, NULL);
    if (name == NULL) return 0;
    llama_runner_program* const program = llama_runner_open(name, threads, 1);
    (*env)->ReleaseStringUTFChars(env, path, name);
    if (program == NULL) throw_last_error(env);
    return (jlong)(intptr_t)program;
}

JNIEXPORT void JNICALL Java_org_llamapte_LlamaRunner_close(JNIEnv* env, jobject self, jlong program) {
    (void)env, (void)self;
    llama_runner_close((llama_runner_program*)(intptr_t)program);
}

JNIEXPORT jlong JNICALL Java_org_llamapte_LlamaRunner_newSession(JNIEnv* env, jobject self, jlong program) {
    (void)self;
    llama_runner_session* const session = llama_runner_session_new((llama_runner_program*)(intptr_t)program);
    if (session == NULL) throw_last_error(env);
    return (jlong)(intptr_t)session;
}

JNIEXPORT void JNICALL Java_org_llamapte_LlamaRunner_freeSession(JNIEnv* env, jobject self, jlong session) {
    (void)env, (void)self;
    llama_runner_session_free((llama_runner_session*)(intptr_t)session);
}

/* Text crosses as UTF-8 bytes: JNI's own strings are not quite UTF-8. */
JNIEXPORT jlongArray JNICALL Java_org_llamapte_LlamaRunner_encode(JNIEnv* env, jobject self, jlong program,
                                                                  jbyteArray text) {
    (void)self;
    const llama_runner_program* const handle = (const llama_runner_program*)(intptr_t)program;
    const jsize length = (*env)->GetArrayLength(env, text);
    jbyte* const bytes = (*env)->GetByteArrayElements(env, text, NULL);
    if (bytes == NULL) return NULL;
    const int64_t count = llama_runner_encode(handle, (const char*)bytes, (size_t)length, 0, NULL, 0);
    int64_t* const ids = count < 0 ? NULL : malloc((size_t)(count + 1) * sizeof *ids);
    jlongArray result = NULL;
    if (ids != NULL) {
        llama_runner_encode(handle, (const char*)bytes, (size_t)length, 0, ids, (size_t)count);
        result = (*env)->NewLongArray(env, (jsize)count);
        if (result != NULL) (*env)->SetLongArrayRegion(env, result, 0, (jsize)count, (const jlong*)ids);
    } else {
        throw_last_error(env);
    }
    free(ids);
    (*env)->ReleaseByteArrayElements(env, text, bytes, JNI_ABORT);
    return result;
}

JNIEXPORT void JNICALL Java_org_llamapte_LlamaRunner_start(JNIEnv* env, jobject self, jlong session, jlongArray prompt,
                                                           jdouble temperature, jdouble top_p, jlong seed,
                                                           jlong max_new_tokens) {
    (void)self;
    llama_runner_options options = llama_runner_default_options();
    options.temperature = temperature;
    options.top_p = top_p;
    options.seed = (uint64_t)seed;
    options.max_new_tokens = max_new_tokens;
    jlong* const ids = (*env)->GetLongArrayElements(env, prompt, NULL);
    if (ids == NULL) return;
    const int status = llama_runner_start((llama_runner_session*)(intptr_t)session, (const int64_t*)ids,
                                          (size_t)(*env)->GetArrayLength(env, prompt), &options);
    (*env)->ReleaseLongArrayElements(env, prompt, ids, JNI_ABORT);
    if (status < 0) throw_last_error(env);
}

/* The text of the next step as UTF-8 bytes, or null after the last. */
JNIEXPORT jbyteArray JNICALL Java_org_llamapte_LlamaRunner_next(JNIEnv* env, jobject self, jlong session) {
    (void)self;
    llama_runner_step step;
    const int status = llama_runner_next((llama_runner_session*)(intptr_t)session, &step);
    if (status < 0) throw_last_error(env);
    if (status != 1) return NULL;
    const jbyteArray text = (*env)->NewByteArray(env, (jsize)step.text_length);
    if (text != NULL) (*env)->SetByteArrayRegion(env, text, 0, (jsize)step.text_length, (const jbyte*)step.text);
    return text;
}
