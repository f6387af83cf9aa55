// Functions that torch_npu links against or looks up, and for which success is answer enough:
// profiling, graph models, attributes of operators that are never compiled, virtual memory, and
// waiting for what is already done. Declared without CANN's headers, as their arguments are unread.

#define SUCCEEDS(name) \
    int name(void) { return 0; }

// Profiling
SUCCEEDS(MsprofGetHashId)
SUCCEEDS(MsprofRegisterCallback)
SUCCEEDS(MsprofReportAdditionalInfo)
SUCCEEDS(MsprofReportApi)
SUCCEEDS(MsprofReportCompactInfo)
SUCCEEDS(MsprofSysCycleTime)

// Start, end, dumps
SUCCEEDS(aclFinalize)
SUCCEEDS(aclmdlInitDump)
SUCCEEDS(aclmdlSetDump)
SUCCEEDS(aclmdlFinalizeDump)

// Operators: attributes and layouts
SUCCEEDS(aclSetTensorFormat)
SUCCEEDS(aclSetTensorPlaceMent)
SUCCEEDS(aclSetTensorShape)
SUCCEEDS(aclopCreateAttr)
SUCCEEDS(aclopDestroyAttr)
SUCCEEDS(aclopSetAttrBool)
SUCCEEDS(aclopSetAttrDataType)
SUCCEEDS(aclopSetAttrFloat)
SUCCEEDS(aclopSetAttrInt)
SUCCEEDS(aclopSetAttrListBool)
SUCCEEDS(aclopSetAttrListFloat)
SUCCEEDS(aclopSetAttrListInt)
SUCCEEDS(aclopSetAttrListListInt)
SUCCEEDS(aclopSetAttrString)
SUCCEEDS(aclnnFusedSgd)
SUCCEEDS(aclrtBinaryGetFunction)
SUCCEEDS(aclrtBinaryLoadFromData)
SUCCEEDS(aclrtGetFunctionAddr)
SUCCEEDS(rtDevBinaryRegister)
SUCCEEDS(rtFunctionRegister)
SUCCEEDS(rtGetC2cCtrlAddr)
SUCCEEDS(rtKernelLaunch)

// Virtual memory, memory of other processes
SUCCEEDS(aclrtDeviceCanAccessPeer)
SUCCEEDS(aclrtDeviceEnablePeerAccess)
SUCCEEDS(aclrtDeviceGetBareTgid)
SUCCEEDS(aclrtFreePhysical)
SUCCEEDS(aclrtMallocPhysical)
SUCCEEDS(aclrtMapMem)
SUCCEEDS(aclrtMemExportToShareableHandle)
SUCCEEDS(aclrtMemImportFromShareableHandle)
SUCCEEDS(aclrtMemSetPidToShareableHandle)
SUCCEEDS(aclrtReleaseMemAddress)
SUCCEEDS(aclrtReserveMemAddress)
SUCCEEDS(aclrtUnmapMem)

// Streams, events, devices: there is nothing to wait for and nothing to give back
SUCCEEDS(aclrtDestroyEvent)
SUCCEEDS(aclrtDestroyStream)
SUCCEEDS(aclrtDestroyStreamForce)
SUCCEEDS(aclrtProcessReport)
SUCCEEDS(aclrtRecordEvent)
SUCCEEDS(aclrtResetDevice)
SUCCEEDS(aclrtResetEvent)
SUCCEEDS(aclrtResetOverflowStatus)
SUCCEEDS(aclrtSetExceptionInfoCallback)
SUCCEEDS(aclrtSetOpExecuteTimeOut)
SUCCEEDS(aclrtSetOpExecuteTimeOutV2)
SUCCEEDS(aclrtSetOpWaitTimeout)
SUCCEEDS(aclrtSetStreamFailureMode)
SUCCEEDS(aclrtSetStreamOverflowSwitch)
SUCCEEDS(aclrtStreamWaitEvent)
SUCCEEDS(aclrtSynchronizeDevice)
SUCCEEDS(aclrtSynchronizeDeviceWithTimeout)
SUCCEEDS(aclrtSynchronizeEvent)
SUCCEEDS(aclrtSynchronizeStream)
SUCCEEDS(aclrtSynchronizeStreamWithTimeout)
